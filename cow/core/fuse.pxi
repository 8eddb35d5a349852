# FUSE's data path: from /dev/fuse to the image and back without Python.
#
# A few threads take requests from the kernel and answer READ, WRITE and LSEEK on the spot. So that
# none of them is kept from the other files for long, there are queues for everything else: for what
# waits for a disk (FSYNC, FALLOCATE), for writes that must break sharing, for requests that met a
# suspended device and are tried again when something in the mapper has changed, and for what is
# about names, which one Python thread answers. Numbers and layouts are the kernel's (fuse(4),
# linux/fuse.h), in the byte order of the machine. A file handle is the address of the device it
# opened: only the kernel sends requests, and none after the RELEASE.

cdef extern from "<unistd.h>" nogil:
    int64_t read(int fd, void *data, size_t size)
    int64_t write(int fd, const void *data, size_t size)
    int close(int fd)

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int maxevents, int timeout)
    enum: EPOLL_CLOEXEC, EPOLL_CTL_ADD
    uint32_t EPOLLIN, EPOLLEXCLUSIVE

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initval, int flags)
    enum: EFD_CLOEXEC

cdef extern from "<errno.h>" nogil:
    enum: EAGAIN, ENODEV, ENOENT, ENOTCONN

cdef enum:
    FUSE_READ = 15
    FUSE_WRITE = 16
    FUSE_FSYNC = 20
    FUSE_FALLOCATE = 43
    FUSE_LSEEK = 46
    FUSE_IN_HEADER = 40
    FUSE_OUT_HEADER = 16
    FUSE_WRITE_DATA = 80            # where the data of a WRITE begins
    FUSE_PAYLOAD = 1 << 20          # most bytes in a READ or WRITE
    FUSE_MEMORY = 2 * (FUSE_PAYLOAD + PAGE)
    FUSE_GATHER = 1 << 16           # longer writes gain nothing from being prepared together
    FUSE_PIECE = 1 << 25            # bytes of a FALLOCATE under one taking of the locks
    FALLOC_FL_ZERO_RANGE = 16
    O_DSYNC = 0o10000
    FUSE_GO_ON = 16                 # a piece is done, others are left

cdef struct fuse_in_header:
    uint32_t len
    uint32_t opcode
    uint64_t unique
    uint64_t nodeid
    uint32_t uid
    uint32_t gid
    uint32_t pid
    uint32_t extensions

cdef struct fuse_out_header:
    uint32_t len
    int error
    uint64_t unique

cdef struct fuse_read_in:           # and the head of a WRITE
    uint64_t fh
    uint64_t offset
    uint32_t size
    uint32_t read_flags
    uint64_t lock_owner
    uint32_t flags                  # of the open file, with O_DSYNC where the call has RWF_DSYNC
    uint32_t padding

cdef struct fuse_fallocate_in:
    uint64_t fh
    uint64_t offset
    uint64_t length
    uint64_t mode

cdef struct fuse_lseek_in:
    uint64_t fh
    uint64_t offset
    uint64_t whence

# A request that waits, with its bytes behind it: in a queue of a connection.
cdef struct fuse_request:
    fuse_request *next
    uint64_t done                   # bytes passed so far
    size_t size

cdef struct fuse_queue:
    pthread_mutex_t mutex
    fuse_request *first
    fuse_request **end
    port_event arrivals

cdef struct fuse_connection:
    int fd
    gate *gate
    int stop                        # readable from stop() on
    uint32_t stopping
    fuse_queue others               # requests for Python
    fuse_queue slow                 # data requests that take long, and those that waited
    fuse_queue waiting              # requests that met a suspended device
    fuse_queue sharing              # writes that must break sharing
    bint gathering                  # a thread does them; guarded by the mutex of that queue

cdef struct seek:
    int whence
    uint64_t position               # bytes of the device passed
    extents looked


cdef inline uint8_t *request_bytes(fuse_request *r) noexcept nogil:
    return <uint8_t *>r + sizeof(fuse_request)


cdef void queue_init(fuse_queue *q) noexcept nogil:
    pthread_mutex_init(&q.mutex, NULL)
    port_event_init(&q.arrivals)
    q.first = NULL
    q.end = &q.first


cdef void queue_destroy(fuse_queue *q) noexcept nogil:
    cdef fuse_request *r
    while q.first != NULL:
        r = q.first
        q.first = r.next
        free(r)
    pthread_mutex_destroy(&q.mutex)


cdef void queue_add(fuse_queue *q, fuse_request *r) noexcept nogil:
    r.next = NULL
    pthread_mutex_lock(&q.mutex)
    q.end[0] = r
    q.end = &r.next
    pthread_mutex_unlock(&q.mutex)
    port_event_raise(&q.arrivals)


cdef fuse_request *queue_take(fuse_queue *q, bint everything) noexcept nogil:
    """Take the first request, or all of them as a list; NULL where there is none."""
    cdef fuse_request *r
    pthread_mutex_lock(&q.mutex)
    r = q.first
    if r != NULL:
        q.first = NULL if everything else r.next
        if q.first == NULL:
            q.end = &q.first
    pthread_mutex_unlock(&q.mutex)
    return r


cdef bint queue_is_empty(fuse_queue *q) noexcept nogil:
    cdef bint empty
    pthread_mutex_lock(&q.mutex)
    empty = q.first == NULL
    pthread_mutex_unlock(&q.mutex)
    return empty


cdef int queue_copy(fuse_queue *q, uint8_t *message, uint64_t done) noexcept nogil:
    """Keep a request that stands in a reader's buffer."""
    cdef size_t size = (<fuse_in_header *>message).len
    cdef fuse_request *r = <fuse_request *>malloc(sizeof(fuse_request) + size)
    if r == NULL:
        return -ENOMEM
    r.done = done
    r.size = size
    memcpy(request_bytes(r), message, size)
    queue_add(q, r)
    return 0


cdef int emit_seek(bio *b, device *image, uint64_t offset, uint64_t length) noexcept nogil:
    """Pass over data (SEEK_HOLE) or holes (SEEK_DATA), and stop at the first of the other."""
    cdef seek *s = <seek *>b.context
    cdef known_run *found
    cdef uint64_t n = length
    if image == NULL:
        n = 0 if s.whence == SEEK_HOLE else length
    elif not port_load32(&image.sparse):
        n = 0 if s.whence == SEEK_DATA else length
    else:
        found = extents_look(&s.looked, image, offset)
        n = 0 if found.data == (s.whence == SEEK_DATA) else min(length, found.end - offset)
    s.position += n
    b.done += n
    return BIO_ENOUGH if n < length else 0


cdef int fuse_seek(device *d, uint8_t *body, uint64_t *reply) noexcept nogil:
    """SEEK_DATA and SEEK_HOLE, as lseek(2) has them: a hole is where no image holds anything."""
    cdef fuse_lseek_in *args = <fuse_lseek_in *>body
    cdef operation o
    cdef seek s
    cdef int rc
    memset(&s, 0, sizeof(s))
    s.whence = <int>args.whence
    s.position = args.offset
    if s.whence not in (SEEK_DATA, SEEK_HOLE):
        return -EINVAL
    if args.offset >= d.size:
        return -ENXIO
    memset(&o, 0, sizeof(o))
    o.op = OP_MAP
    o.offset = args.offset
    o.length = d.size - args.offset
    o.emit = emit_seek
    o.context = &s
    rc = operation_run(d, &o)
    if rc == 0 and s.whence == SEEK_DATA:
        return -ENXIO
    reply[0] = s.position
    return 0 if rc == BIO_ENOUGH else rc


cdef int fuse_fallocate(device *d, uint8_t *body, uint64_t *done) noexcept nogil:
    """Do one piece of a FALLOCATE, with the rules of a block device (blkdev_fallocate).

    PUNCH_HOLE promises zeros, so only devices with no snapshot below take it as a discard.
    """
    cdef fuse_fallocate_in *args = <fuse_fallocate_in *>body
    cdef uint64_t length = args.length
    cdef operation o
    cdef int rc
    if not d.writable:
        return -EPERM
    if args.offset >= d.size:
        return -EINVAL
    if length > d.size - args.offset:
        if not args.mode & FALLOC_FL_KEEP_SIZE:
            return -EINVAL
        length = d.size - args.offset
    memset(&o, 0, sizeof(o))
    if args.mode & ~<uint64_t>FALLOC_FL_KEEP_SIZE == FALLOC_FL_ZERO_RANGE:
        o.op = OP_WRITE
    elif args.mode == FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE and d.plain:
        o.op = OP_DISCARD
    else:
        return -EOPNOTSUPP
    if done[0] >= length:
        return 0
    o.offset = args.offset + done[0]
    o.length = min(length - done[0], <uint64_t>FUSE_PIECE)
    rc = operation_run(d, &o)
    done[0] += o.length if rc == 0 else o.done
    return FUSE_GO_ON if rc == 0 and done[0] < length else rc


cdef int fuse_transfer(
    device *d, uint8_t *message, uint8_t *data, uint64_t *done, size_t *answered, bint in_place
) noexcept nogil:
    """READ into `data`, or WRITE; what lies past the end is cut off, as a block device does it.

    A write that is to be done `in_place` answers BIO_SHARED where it would change a snapshot.
    """
    cdef fuse_read_in *args = <fuse_read_in *>(message + FUSE_IN_HEADER)
    cdef bint writing = (<fuse_in_header *>message).opcode == FUSE_WRITE
    cdef operation o
    cdef bio b
    cdef int rc
    memset(&o, 0, sizeof(o))
    o.offset = args.offset
    if args.offset < d.size:
        o.length = min(<uint64_t>args.size, d.size - args.offset)
        o.length = min(o.length, <uint64_t>FUSE_PAYLOAD)
    if writing:
        if not d.writable:
            return -EPERM
        if o.length == 0 and args.size and not d.removed:
            return -ENOSPC
        o.op = OP_WRITE
        o.data = message + FUSE_WRITE_DATA
        o.done = done[0]
    else:
        o.op = OP_READ
        o.data = data
    if writing and in_place and o.length and not d.removed:
        bio_init(&b, WRITE, emit_write, o.data + o.done)
        rc = request(d, &b, o.offset + o.done, o.length - o.done)
        o.done += b.done
    else:
        rc = operation_run(d, &o) if o.length or d.removed else 0
    done[0] = o.done
    if rc:
        return rc
    if writing:
        memset(data, 0, 8)
        memcpy(data, &o.length, 4)
        answered[0] = 8
    else:
        answered[0] = o.length
    return 0


cdef int fuse_flush(device *d) noexcept nogil:
    cdef operation o
    memset(&o, 0, sizeof(o))
    o.op = OP_FLUSH
    return operation_run(d, &o)


cdef inline bint fuse_is_slow(uint8_t *message) noexcept nogil:
    """Whether a data request waits for a disk in any case."""
    cdef uint32_t opcode = (<fuse_in_header *>message).opcode
    if opcode == FUSE_WRITE:
        return (<fuse_read_in *>(message + FUSE_IN_HEADER)).flags & O_DSYNC != 0
    return opcode == FUSE_FSYNC or opcode == FUSE_FALLOCATE


cdef int fuse_perform(
    uint8_t *message, uint8_t *reply, uint64_t *done, size_t *answered, bint in_place
) noexcept nogil:
    """Do one data request, with its answer behind the head of `reply`."""
    cdef uint8_t *body = message + FUSE_IN_HEADER
    cdef uint32_t opcode = (<fuse_in_header *>message).opcode
    cdef device *d = <device *><size_t>(<uint64_t *>body)[0]
    cdef int rc = FUSE_GO_ON
    while rc == FUSE_GO_ON:
        answered[0] = 0
        port_read_lock(&d.gate.lock)
        if opcode == FUSE_READ or opcode == FUSE_WRITE:
            rc = fuse_transfer(d, message, reply + FUSE_OUT_HEADER, done, answered, in_place)
            if rc == 0 and fuse_is_slow(message):
                rc = fuse_flush(d)
        elif opcode == FUSE_FALLOCATE:
            rc = fuse_fallocate(d, body, done)
        elif opcode == FUSE_LSEEK:
            rc = fuse_seek(d, body, <uint64_t *>(reply + FUSE_OUT_HEADER))
            answered[0] = 8
        else:
            rc = fuse_flush(d)
        port_read_unlock(&d.gate.lock)
    return rc


cdef void fuse_reply(
    fuse_connection *c, uint8_t *message, uint8_t *reply, size_t answered, int rc
) noexcept nogil:
    """Answer a request, unless nobody waits for it any more."""
    cdef fuse_out_header *head = <fuse_out_header *>reply
    head.len = <uint32_t>(FUSE_OUT_HEADER + (answered if rc == 0 else 0))
    head.error = rc
    head.unique = (<fuse_in_header *>message).unique
    port_fuse_answer()
    write(c.fd, reply, head.len)    # where the file system is unmounted, the next read tells


cdef void fuse_handle(fuse_connection *c, uint8_t *message, uint8_t *reply) noexcept nogil:
    """Answer a request that has just arrived, or give it to those who do."""
    cdef uint32_t opcode = (<fuse_in_header *>message).opcode
    cdef uint64_t done = 0
    cdef size_t answered = 0
    cdef int rc
    if fuse_is_slow(message):
        rc = queue_copy(&c.slow, message, 0)
    elif opcode not in (FUSE_READ, FUSE_WRITE, FUSE_LSEEK):
        rc = queue_copy(&c.others, message, 0)
    else:
        rc = fuse_perform(message, reply, &done, &answered, True)
        if rc == BIO_SHARED or rc == BIO_HELD:
            fuse_gather(c, message, reply, done)
            return
        if rc <= 0:
            fuse_reply(c, message, reply, answered, rc)
            return
        rc = queue_copy(&c.waiting, message, done)
    if rc:
        fuse_reply(c, message, reply, 0, rc)


cdef void fuse_finish(fuse_connection *c, fuse_request *r, uint8_t *reply) noexcept nogil:
    """Answer a request that was taken from a queue, or let it wait for a suspended device."""
    cdef size_t answered = 0
    cdef int rc = fuse_perform(request_bytes(r), reply, &r.done, &answered, False)
    if rc > 0:
        queue_add(&c.waiting, r)
        return
    fuse_reply(c, request_bytes(r), reply, answered, rc)
    free(r)


cdef void fuse_gather(
    fuse_connection *c, uint8_t *message, uint8_t *reply, uint64_t done
) noexcept nogil:
    """Take up a write that must break sharing; one thread does all that arrive meanwhile.

    So they are prepared together and committed together, with one pair of barriers, and hold up no
    other thread. Each is answered by itself afterwards; whatever went wrong here shows then.
    """
    cdef fuse_request *r
    cdef fuse_request *following
    cdef size_t answered = 0
    cdef int rc
    if (<fuse_in_header *>message).len > FUSE_GATHER or queue_copy(&c.sharing, message, done):
        rc = fuse_perform(message, reply, &done, &answered, False)
        if rc > 0:
            rc = queue_copy(&c.waiting, message, done)
            if rc == 0:
                return
        fuse_reply(c, message, reply, answered, rc)
        return
    while gathering_begins(c):
        r = queue_take(&c.sharing, True)
        fuse_prepare(c, r)
        while r != NULL:
            following = r.next
            fuse_finish(c, r, reply)
            r = following
        pthread_mutex_lock(&c.sharing.mutex)
        c.gathering = False
        pthread_mutex_unlock(&c.sharing.mutex)


cdef bint gathering_begins(fuse_connection *c) noexcept nogil:
    """Become the thread that breaks sharing, if there is something to do and nobody is at it."""
    cdef bint begins
    pthread_mutex_lock(&c.sharing.mutex)
    begins = not c.gathering and c.sharing.first != NULL
    if begins:
        c.gathering = True
    pthread_mutex_unlock(&c.sharing.mutex)
    return begins


cdef void fuse_prepare(fuse_connection *c, fuse_request *r) noexcept nogil:
    """Break sharing for a list of writes, as far as that goes without an error."""
    cdef commit_group group
    cdef fuse_read_in *args
    cdef device *d
    cdef bio b
    group.count = 0
    port_read_lock(&c.gate.lock)
    while r != NULL:
        args = <fuse_read_in *>(request_bytes(r) + FUSE_IN_HEADER)
        d = <device *><size_t>args.fh
        bio_init(&b, PREPARE, emit_nothing, request_bytes(r) + FUSE_WRITE_DATA + r.done)
        b.group = &group
        if not d.writable or device_map(d, &b, args.offset + r.done, args.size - r.done):
            break
        r = r.next
    group_commit(&group)
    port_read_unlock(&c.gate.lock)


cdef int fuse_receive(fuse_connection *c, int wake, uint8_t *message) noexcept nogil:
    """Read a request; 0 when there will be none any more."""
    cdef epoll_event event
    cdef int64_t n
    while not port_load32(&c.stopping):
        n = read(c.fd, message, FUSE_WRITE_DATA + FUSE_PAYLOAD)
        if n > 0:
            port_fuse_request()
            return 1
        if n == 0 or errno == ENODEV:
            return 0
        if errno == EAGAIN:
            epoll_wait(wake, &event, 1, -1)
        elif errno not in (EINTR, ENOENT):
            return -errno
    return 0


cdef int fuse_serve(fuse_connection *c, int wake, uint8_t *message, uint8_t *reply) noexcept nogil:
    """Take requests from the kernel until the end."""
    cdef int rc
    while True:
        rc = fuse_receive(c, wake, message)
        if rc <= 0:
            return rc
        fuse_handle(c, message, reply)


cdef void fuse_work(fuse_connection *c, uint8_t *reply) noexcept nogil:
    """Answer what takes long, until the end."""
    cdef fuse_request *r
    cdef uint64_t seen
    while not port_load32(&c.stopping):
        seen = port_event_count(&c.slow.arrivals)
        r = queue_take(&c.slow, False)
        if r != NULL:
            fuse_finish(c, r, reply)
        else:
            port_event_wait(&c.slow.arrivals, seen, 10 * WAIT_SLICE)


cdef size_t fuse_wait_to_retry(fuse_connection *c) noexcept nogil:
    """Wait until something has changed, or some time; return how many requests wait for that."""
    cdef fuse_request *r
    cdef size_t count = 0
    cdef uint64_t arrived = port_event_count(&c.waiting.arrivals)
    cdef uint64_t changes = port_event_count(&c.gate.changes)
    if queue_is_empty(&c.waiting):
        port_event_wait(&c.waiting.arrivals, arrived, 10 * WAIT_SLICE)
        return 0
    port_event_wait(&c.gate.changes, changes, WAIT_SLICE)
    pthread_mutex_lock(&c.waiting.mutex)
    r = c.waiting.first
    while r != NULL:
        count += 1
        r = r.next
    pthread_mutex_unlock(&c.waiting.mutex)
    return count


@cython.final
cdef class FuseConnection:
    """The requests of one mounted file system, from a descriptor of /dev/fuse that does not block.

    serve(), work() and retry() run in threads of their own until stop(); serve() ends when the file
    system is unmounted, too. The descriptor stays the caller's, who answers what take() returns.
    """

    cdef fuse_connection c
    cdef readonly Gate gate

    def __cinit__(self, int fd, Gate gate not None):
        queue_init(&self.c.others)
        queue_init(&self.c.slow)
        queue_init(&self.c.waiting)
        queue_init(&self.c.sharing)
        self.gate = gate
        self.c.fd = fd
        self.c.gate = &gate.g
        self.c.stop = eventfd(0, EFD_CLOEXEC)
        if self.c.stop < 0:
            raise OSError(errno, os.strerror(errno))

    def __dealloc__(self):
        if self.c.stop >= 0:
            close(self.c.stop)
        queue_destroy(&self.c.sharing)
        queue_destroy(&self.c.waiting)
        queue_destroy(&self.c.slow)
        queue_destroy(&self.c.others)

    @property
    def stopped(self):
        """Whether serve(), work(), retry() and take() are to end."""
        return port_load32(&self.c.stopping) != 0

    @staticmethod
    def handle(BlockDevice device not None):
        """Return the file handle of a device; while files are open its user keeps the device."""
        return <size_t>&device.d

    def serve(self):
        """Answer data requests until the file system is unmounted, or stop() is called."""
        cdef uint8_t *memory
        cdef epoll_event event
        cdef int rc = 0
        cdef int wake = epoll_create1(EPOLL_CLOEXEC)
        if wake < 0:
            raise OSError(errno, os.strerror(errno))
        memory = <uint8_t *>mmap(NULL, FUSE_MEMORY, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if memory == <uint8_t *>MAP_FAILED:
            close(wake)
            raise MemoryError("no memory for the requests of a file system")
        memset(&event, 0, sizeof(event))
        event.events = EPOLLIN
        if epoll_ctl(wake, EPOLL_CTL_ADD, self.c.stop, &event):
            rc = -errno
        event.events = EPOLLIN | EPOLLEXCLUSIVE     # a request wakes one thread, not all
        if rc == 0 and epoll_ctl(wake, EPOLL_CTL_ADD, self.c.fd, &event):
            rc = -errno
        if rc == 0:
            with nogil:
                # Data begins at a page: the kernel moves it page by page.
                rc = fuse_serve(&self.c, wake, memory + PAGE - FUSE_WRITE_DATA,
                                memory + FUSE_PAYLOAD + 2 * PAGE - FUSE_OUT_HEADER)
        munmap(memory, FUSE_MEMORY)
        close(wake)
        if rc:
            raise OSError(-rc, os.strerror(-rc))

    def work(self):
        """Answer the requests that take long, until stop() is called."""
        cdef uint8_t *reply = <uint8_t *>malloc(FUSE_OUT_HEADER + FUSE_PAYLOAD)
        if reply == NULL:
            raise MemoryError("no memory for the requests of a file system")
        with nogil:
            fuse_work(&self.c, reply)
        free(reply)

    def retry(self, given_up):
        """Have what waits for suspended devices tried again and again, until stop() is called.

        Before each attempt given_up(unique, thread) is asked, with the request's number and the
        thread that made it: where it says so, the request ends with EINTR. Only this takes requests
        from those that wait, so that none passes unasked.
        """
        cdef uint8_t reply[FUSE_OUT_HEADER]
        cdef fuse_request *r
        cdef fuse_in_header *head
        cdef size_t count
        while not self.stopped:
            with nogil:
                count = fuse_wait_to_retry(&self.c)
            for _ in range(count):
                with nogil:
                    r = queue_take(&self.c.waiting, False)
                    head = <fuse_in_header *>request_bytes(r)
                ends = False
                try:
                    ends = given_up(head.unique, head.pid)
                finally:
                    if ends:
                        fuse_reply(&self.c, request_bytes(r), reply, 0, -EINTR)
                        free(r)
                    else:
                        with nogil:
                            queue_add(&self.c.slow, r)

    def take(self, uint64_t milliseconds):
        """Return the next request that is not about data, None if none comes in time."""
        cdef fuse_request *r
        cdef uint64_t seen
        with nogil:
            seen = port_event_count(&self.c.others.arrivals)
            r = queue_take(&self.c.others, False)
            if r == NULL and not port_load32(&self.c.stopping):
                port_event_wait(&self.c.others.arrivals, seen, 1000 * milliseconds)
                r = queue_take(&self.c.others, False)
        if r == NULL:
            return None
        try:
            message = PyBytes_FromStringAndSize(<char *>request_bytes(r), <Py_ssize_t>r.size)
        finally:
            free(r)
        return message

    def stop(self):
        """End serve(), work(), retry() and take() in their threads, after what is under way."""
        cdef uint64_t one = 1
        port_store32(&self.c.stopping, 1)
        write(self.c.stop, &one, 8)
        port_event_raise(&self.c.slow.arrivals)
        port_event_raise(&self.c.waiting.arrivals)
        port_event_raise(&self.c.others.arrivals)
