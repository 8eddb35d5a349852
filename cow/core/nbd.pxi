# NBD's transmission phase: from the socket to the image and back without Python.
#
# One thread a connection. Requests are taken from a buffer as large as what has arrived, and
# replies collected in another; it is sent when nothing complete is left to answer, so a client that
# keeps many requests in flight costs two system calls for all of them. A long write is done in
# pieces, while the rest of it still comes. The numbers are those of the protocol's description
# (proto.md of the NetworkBlockDevice project), all of them big-endian.

cdef extern from "port.h" nogil:
    uint64_t port_get_be(const uint8_t *p, int size)
    void port_put_be(uint8_t *p, int size, uint64_t value)

cdef extern from "<sys/socket.h>" nogil:
    int64_t recv(int fd, void *data, size_t size, int flags)
    int64_t send(int fd, const void *data, size_t size, int flags)
    enum: MSG_DONTWAIT, MSG_NOSIGNAL

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<fcntl.h>" nogil:
    int posix_fadvise(int fd, int64_t offset, int64_t length, int advice)
    enum: POSIX_FADV_WILLNEED

cdef enum:
    NBD_REQUEST_MAGIC = 0x25609513
    NBD_SIMPLE_REPLY_MAGIC = 0x67446698
    NBD_STRUCTURED_REPLY_MAGIC = 0x668e33ef
    NBD_REQUEST_SIZE = 28
    NBD_MAX_PAYLOAD = 1 << 25
    NBD_BUFFER = 1 << 19            # both buffers, at first
    NBD_PIECE = 1 << 17             # of a long write; replies are sent when they reach it
    NBD_READ = 0
    NBD_WRITE = 1
    NBD_DISC = 2
    NBD_FLUSH = 3
    NBD_TRIM = 4
    NBD_CACHE = 5
    NBD_WRITE_ZEROES = 6
    NBD_BLOCK_STATUS = 7
    NBD_FUA = 1
    NBD_NO_HOLE = 2
    NBD_DF = 4
    NBD_REQ_ONE = 8
    NBD_FAST_ZERO = 16
    NBD_REPLY_DONE = 1
    NBD_REPLY_NONE = 0
    NBD_REPLY_OFFSET_DATA = 1
    NBD_REPLY_BLOCK_STATUS = 5
    NBD_REPLY_ERROR = 32769
    NBD_STATE_HOLE_ZERO = 3
    NBD_STATUS_EXTENTS = 1 << 12    # most extents in one reply
    NBD_PATIENCE = 50               # microseconds a request is looked for without sleeping
    NBD_BLIND_MOST = 1 << 10        # waits in a row that sleep at once
    NBD_BATCH = 64                  # most writes prepared together

cdef struct nbd_buffer:
    uint8_t *data
    size_t capacity
    size_t start
    size_t end

cdef struct nbd_connection:
    int fd
    device *dev
    bint structured
    uint32_t context                # id of base:allocation, 0: not negotiated
    uint32_t stopping
    uint64_t prepared               # so many of the next requests are writes prepared already
    uint64_t placed                 # a bit for each of them: its data is in fresh chunks
    uint32_t blind                  # so many of the next waits sleep at once
    uint32_t blind_next             # as many the next time that looking was in vain
    nbd_buffer received
    nbd_buffer replies

cdef struct nbd_request:
    uint32_t flags
    uint32_t type
    uint64_t cookie
    uint64_t offset
    uint64_t length
    bint placed                     # it is a write whose data is in fresh chunks already


cdef int nbd_room(nbd_buffer *b, size_t size) noexcept nogil:
    """Make room for `size` bytes behind the end."""
    cdef size_t held = b.end - b.start, capacity
    cdef void *data
    if b.capacity - b.end >= size:
        return 0
    if b.start:
        memmove(b.data, b.data + b.start, held)
        b.start = 0
        b.end = held
    if b.capacity - b.end >= size:
        return 0
    capacity = max(<size_t>NBD_BUFFER, held + size)
    data = realloc(b.data, capacity)
    if data == NULL:
        return -ENOMEM
    b.data = <uint8_t *>data
    b.capacity = capacity
    return 0


cdef int nbd_send(nbd_connection *c) noexcept nogil:
    cdef int64_t n
    while c.replies.start < c.replies.end:
        n = send(c.fd, c.replies.data + c.replies.start, c.replies.end - c.replies.start,
                 MSG_NOSIGNAL)
        if n < 0:
            if errno == EINTR:
                continue
            return -errno
        c.replies.start += <size_t>n
    c.replies.start = 0
    c.replies.end = 0
    return 0


cdef int64_t nbd_recv(nbd_connection *c, uint8_t *data, size_t size) noexcept nogil:
    """recv(2), but look a while before sleeping: waking up costs both sides more than that.

    Whoever else wants the core gets it at once. Where looking was in vain lately, ever more waits
    sleep without it.
    """
    cdef uint64_t start
    cdef int64_t n
    if c.blind:
        c.blind -= 1
        return recv(c.fd, data, size, 0)
    n = recv(c.fd, data, size, MSG_DONTWAIT)
    if n >= 0 or errno != EAGAIN:
        return n
    start = port_microseconds()
    while port_microseconds() - start < NBD_PATIENCE:
        sched_yield()
        n = recv(c.fd, data, size, MSG_DONTWAIT)
        if n >= 0 or errno != EAGAIN:
            c.blind_next >>= 1
            return n
    c.blind_next = <uint32_t>min(2 * c.blind_next + 1, NBD_BLIND_MOST)
    c.blind = c.blind_next
    return recv(c.fd, data, size, 0)


cdef int nbd_receive(nbd_connection *c, size_t size) noexcept nogil:
    """Have `size` bytes in the buffer; 1 if the client has gone. Replies go out before a wait."""
    cdef nbd_buffer *b = &c.received
    cdef int64_t n
    cdef int rc
    if b.end - b.start >= size:
        return 0
    rc = nbd_send(c)
    if rc == 0:
        rc = nbd_room(b, size - (b.end - b.start))
    while rc == 0 and b.end - b.start < size:
        n = nbd_recv(c, b.data + b.end, b.capacity - b.end)
        if n == 0:
            return 1
        if n > 0:
            b.end += <size_t>n
        elif errno != EINTR:
            rc = -errno
    return rc


cdef int nbd_perform(nbd_connection *c, operation *o) noexcept nogil:
    """Run an operation; while a device on the way is suspended it waits, and fails if stopped.

    0, -errno, or BIO_ENOUGH.
    """
    cdef gate *g = c.dev.gate
    cdef uint64_t seen
    cdef int rc
    while True:
        port_use_begins()
        port_read_lock(&g.lock)
        seen = port_event_count(&g.changes)
        rc = operation_run(c.dev, o)
        port_read_unlock(&g.lock)
        port_use_ends()
        if rc <= 0 or rc == BIO_ENOUGH:
            return rc
        if port_load32(&c.stopping) or nbd_send(c):
            return -ENXIO
        port_event_wait(&g.changes, seen, WAIT_SLICE)


cdef uint32_t nbd_errno(int rc) noexcept nogil:
    """The protocol knows few errors, and numbers them itself."""
    if rc in (-EPERM, -EIO, -ENOMEM, -EINVAL, -ENOSPC):
        return <uint32_t>-rc
    if rc == -EOPNOTSUPP:
        return 95
    return 108 if rc == -ENXIO else 5


cdef int nbd_put_reply(
    nbd_connection *c, nbd_request *r, int kind, size_t length, int rc
) noexcept nogil:
    """Append the head of a reply; `length` bytes of a structured one are to follow.

    What can have no data is answered by a simple one in any case: clients read it in one piece.
    """
    cdef uint8_t *p
    cdef int failed = nbd_room(&c.replies, 64 + length)
    if failed:
        return failed
    p = c.replies.data + c.replies.end
    if not c.structured or r.type not in (NBD_READ, NBD_BLOCK_STATUS):
        port_put_be(p, 4, NBD_SIMPLE_REPLY_MAGIC)
        port_put_be(p + 4, 4, nbd_errno(rc) if rc else 0)
        port_put_be(p + 8, 8, r.cookie)
        c.replies.end += 16
        return 0
    if rc:
        kind = NBD_REPLY_ERROR
        length = 6
        port_put_be(p + 20, 4, nbd_errno(rc))
        port_put_be(p + 24, 2, 0)
    port_put_be(p, 4, NBD_STRUCTURED_REPLY_MAGIC)
    port_put_be(p + 4, 2, NBD_REPLY_DONE)
    port_put_be(p + 6, 2, <uint64_t>kind)
    port_put_be(p + 8, 8, r.cookie)
    port_put_be(p + 16, 4, length)
    c.replies.end += 26 if rc else 20
    return 0


cdef bint nbd_flags_known(nbd_connection *c, nbd_request *r) noexcept nogil:
    """Tell whether the command knows its flags; FUA is taken with all of them."""
    cdef uint32_t known = NBD_FUA
    if r.type == NBD_READ and c.structured:
        known |= NBD_DF
    elif r.type == NBD_WRITE_ZEROES:
        known |= NBD_NO_HOLE | NBD_FAST_ZERO
    elif r.type == NBD_BLOCK_STATUS:
        known |= NBD_REQ_ONE
    return not r.flags & ~known


cdef int nbd_read(nbd_connection *c, nbd_request *r) noexcept nogil:
    """Read straight into the buffer of replies, behind the reply's head."""
    cdef size_t start, head = 28 if c.structured else 16
    cdef operation o
    cdef int rc = nbd_room(&c.replies, head + r.length)
    if rc:
        return rc
    start = c.replies.end
    memset(&o, 0, sizeof(o))
    o.op = OP_READ
    o.data = c.replies.data + start + head
    o.offset = r.offset
    o.length = r.length
    rc = nbd_perform(c, &o)
    if start != c.replies.end:
        # What was collected went out while a suspended device was waited for.
        memmove(c.replies.data + head, c.replies.data + start + head, r.length)
    if rc:
        return nbd_put_reply(c, r, NBD_REPLY_OFFSET_DATA, 0, rc)
    rc = nbd_put_reply(c, r, NBD_REPLY_OFFSET_DATA, 8 + r.length, 0)
    if rc:
        return rc
    if c.structured:
        port_put_be(c.replies.data + c.replies.end, 8, r.offset)
        c.replies.end += 8
    c.replies.end += r.length
    return 0


cdef int nbd_write(nbd_connection *c, nbd_request *r, uint8_t *data) noexcept nogil:
    """WRITE, and WRITE_ZEROES where `data` is NULL; FUA flushes what was written."""
    cdef operation o
    cdef int rc
    memset(&o, 0, sizeof(o))
    o.op = OP_WRITE
    o.data = data
    o.offset = r.offset
    o.length = r.length
    if data == NULL and c.dev.plain and not r.flags & NBD_NO_HOLE:
        o.op = OP_DISCARD           # a hole reads as zeros, and costs nothing
    elif r.flags & NBD_FAST_ZERO:
        return -EOPNOTSUPP
    rc = nbd_perform(c, &o) if r.length and not r.placed else 0
    if rc == 0 and r.flags & NBD_FUA:
        o.op = OP_FLUSH
        rc = nbd_perform(c, &o)
    return rc


cdef int nbd_block_status(nbd_connection *c, nbd_request *r) noexcept nogil:
    """base:allocation: holes and zeros, neighbours of the same kind as one."""
    cdef extents found
    cdef operation o
    cdef uint64_t i, length
    cdef uint8_t *p
    cdef int rc
    memset(&found, 0, sizeof(found))
    memset(&o, 0, sizeof(o))
    found.most = 1 if r.flags & NBD_REQ_ONE else NBD_STATUS_EXTENTS
    o.op = OP_MAP
    o.offset = r.offset
    o.length = r.length
    o.emit = emit_extent
    o.context = &found
    rc = nbd_perform(c, &o)
    if rc < 0:
        free(found.items)
        return nbd_put_reply(c, r, NBD_REPLY_BLOCK_STATUS, 0, rc)
    length = 4 + 8 * found.count
    rc = nbd_put_reply(c, r, NBD_REPLY_BLOCK_STATUS, length, 0)
    if rc == 0:
        p = c.replies.data + c.replies.end
        port_put_be(p, 4, c.context)
        for i in range(found.count):
            port_put_be(p + 4 + 8 * i, 4, found.items[i].length)
            port_put_be(p + 8 + 8 * i, 4, NBD_STATE_HOLE_ZERO if found.items[i].zero else 0)
        c.replies.end += length
    free(found.items)
    return rc


cdef int emit_cache(bio *b, device *image, uint64_t offset, uint64_t length) noexcept nogil:
    """Have the kernel read ahead what is to be asked for. It is advice: nothing can fail."""
    if image != NULL:
        posix_fadvise(image.fd, <int64_t>offset, <int64_t>length, POSIX_FADV_WILLNEED)
    b.done += length
    return 0


cdef int nbd_refuse(nbd_connection *c, nbd_request *r) noexcept nogil:
    """Return the error of a request that cannot be done, 0 for any other."""
    cdef uint64_t size = c.dev.size
    if not nbd_flags_known(c, r):
        return -EINVAL
    if r.type != NBD_FLUSH and (r.length > size or r.offset > size - r.length):
        return -ENOSPC if r.type in (NBD_WRITE, NBD_WRITE_ZEROES) else -EINVAL
    if r.type in (NBD_WRITE, NBD_WRITE_ZEROES, NBD_TRIM) and not c.dev.writable:
        return -EPERM
    if r.type == NBD_READ and r.length > NBD_MAX_PAYLOAD:
        return -EINVAL
    return 0


cdef int nbd_answer(nbd_connection *c, nbd_request *r, uint8_t *data) noexcept nogil:
    """Do one request and append its reply."""
    cdef operation o
    cdef int rc = nbd_refuse(c, r)
    memset(&o, 0, sizeof(o))
    o.offset = r.offset
    o.length = r.length
    if rc:
        pass
    elif r.type == NBD_READ and r.length:
        return nbd_read(c, r)
    elif r.type == NBD_BLOCK_STATUS and c.context and r.length:
        return nbd_block_status(c, r)
    elif r.type == NBD_WRITE or r.type == NBD_WRITE_ZEROES:
        rc = nbd_write(c, r, data)
    elif r.type == NBD_FLUSH:
        o.op = OP_FLUSH
        rc = nbd_perform(c, &o)
    elif r.type == NBD_TRIM:
        o.op = OP_DISCARD
        rc = nbd_perform(c, &o) if r.length else 0
        if rc == 0 and r.flags & NBD_FUA:
            o.op = OP_FLUSH
            rc = nbd_perform(c, &o)
    elif r.type == NBD_CACHE:
        o.op = OP_MAP
        o.emit = emit_cache
        rc = nbd_perform(c, &o) if r.length else 0
    elif r.type != NBD_READ:
        rc = -EINVAL
    return nbd_put_reply(c, r, NBD_REPLY_NONE, 0, rc)


cdef void nbd_pass(nbd_connection *c, size_t size) noexcept nogil:
    """Be done with so many bytes received."""
    c.received.start += size
    if c.received.start == c.received.end:
        c.received.start = 0
        c.received.end = 0


cdef inline uint64_t nbd_piece(uint64_t offset, uint64_t length) noexcept nogil:
    """Return the length of the first piece of a range: up to a multiple of NBD_PIECE.

    So no chunk up to that size is cut in two.
    """
    return min(length, NBD_PIECE - (offset & (NBD_PIECE - 1)))


cdef int nbd_write_pieces(nbd_connection *c, nbd_request *r) noexcept nogil:
    """WRITE while the data still comes, with one answer at the end; 1 if the client has gone."""
    cdef nbd_request piece = r[0]
    cdef uint64_t end = r.offset + r.length
    cdef int received, rc = nbd_refuse(c, r)
    while piece.offset < end:
        piece.length = nbd_piece(piece.offset, end - piece.offset)
        piece.flags = r.flags if piece.offset + piece.length == end else 0
        received = nbd_receive(c, piece.length)
        if received:
            return received
        if rc == 0:
            rc = nbd_write(c, &piece, c.received.data + c.received.start)
        nbd_pass(c, piece.length)
        piece.offset += piece.length
    return nbd_put_reply(c, r, NBD_REPLY_NONE, 0, rc)


cdef bint nbd_parse(nbd_buffer *b, size_t at, nbd_request *r) noexcept nogil:
    """Take apart the request that starts at `at`; false if it is none."""
    cdef uint8_t *p = b.data + at
    r.flags = <uint32_t>port_get_be(p + 4, 2)
    r.type = <uint32_t>port_get_be(p + 6, 2)
    r.cookie = port_get_be(p + 8, 8)
    r.offset = port_get_be(p + 16, 8)
    r.length = port_get_be(p + 24, 4)
    r.placed = False
    return port_get_be(p, 4) == NBD_REQUEST_MAGIC


cdef void nbd_prepare(nbd_connection *c) noexcept nogil:
    """Prepare the writes that have arrived, and commit them together: one pair of barriers for all.

    Each is answered by itself afterwards; whatever went wrong here shows then.
    """
    cdef nbd_buffer *b = &c.received
    cdef nbd_request r
    cdef commit_group group
    cdef bio preparing
    cdef size_t at = b.start
    cdef uint64_t count = 0, placed = 0
    cdef int rc
    group.count = 0
    port_read_lock(&c.dev.gate.lock)
    while count < NBD_BATCH and b.end - at >= NBD_REQUEST_SIZE and nbd_parse(b, at, &r):
        if r.type != NBD_WRITE or r.length > b.end - at - NBD_REQUEST_SIZE or r.length == 0:
            break
        if not c.dev.writable or not nbd_flags_known(c, &r):
            break
        bio_init(&preparing, PREPARE, emit_nothing, b.data + at + NBD_REQUEST_SIZE)
        preparing.group = &group
        if device_map(c.dev, &preparing, r.offset, r.length):
            break
        if preparing.placed == r.length:
            placed |= <uint64_t>1 << count
        at += NBD_REQUEST_SIZE + r.length
        count += 1
    rc = group_commit(&group)
    port_read_unlock(&c.dev.gate.lock)
    c.prepared = max(count, <uint64_t>1)
    c.placed = placed if rc == 0 and group.sound else 0


cdef int nbd_serve(nbd_connection *c) noexcept nogil:
    """Answer requests until the client goes; -EINVAL for what is no request."""
    cdef nbd_request r
    cdef uint8_t *p
    cdef size_t payload
    cdef bint sound
    cdef int rc
    while True:
        rc = nbd_receive(c, NBD_REQUEST_SIZE)
        if rc:
            return 0 if rc == 1 else rc
        sound = nbd_parse(&c.received, c.received.start, &r)
        payload = r.length if r.type == NBD_WRITE else 0
        if not sound or payload > NBD_MAX_PAYLOAD or r.type == NBD_DISC:
            rc = nbd_send(c)
            return rc if r.type == NBD_DISC and sound else -EINVAL
        if payload > 2 * NBD_PIECE and not c.prepared and not (
                c.dev.nr_locks and c.dev.gate.power):
            nbd_pass(c, NBD_REQUEST_SIZE)
            rc = nbd_write_pieces(c, &r)
            if rc:
                return 0 if rc == 1 else rc
            continue
        rc = nbd_receive(c, NBD_REQUEST_SIZE + payload)
        if rc:
            return 0 if rc == 1 else rc
        if r.type == NBD_WRITE and c.dev.nr_locks:
            if c.prepared == 0:
                nbd_prepare(c)
            r.placed = c.placed & 1
            c.placed >>= 1
            c.prepared -= 1
        p = c.received.data + c.received.start + NBD_REQUEST_SIZE
        rc = nbd_answer(c, &r, p if r.type == NBD_WRITE else NULL)
        nbd_pass(c, NBD_REQUEST_SIZE + payload)
        if rc == 0 and c.replies.end >= NBD_PIECE:
            rc = nbd_send(c)
        if rc:
            return rc


@cython.final
cdef class NbdConnection:
    """The transmission phase of one client of a device, on a connected socket.

    `structured` tells whether structured replies were negotiated, `context` is the id given to
    base:allocation, 0 where the client did not ask for it.
    """

    cdef nbd_connection c
    cdef readonly BlockDevice device

    def __cinit__(self, int fd, BlockDevice device not None, *, bint structured, uint32_t context):
        self.device = device
        self.c.fd = fd
        self.c.dev = &device.d
        self.c.structured = structured
        self.c.context = context

    def __dealloc__(self):
        free(self.c.received.data)
        free(self.c.replies.data)

    def run(self):
        """Serve until nothing more comes; OSError for a broken rule."""
        cdef int rc
        with nogil:
            rc = nbd_serve(&self.c)
        if rc:
            raise OSError(-rc, os.strerror(-rc))

    def stop(self):
        """Wait for no suspended device any more: what meets one fails with ESHUTDOWN.

        run() goes on until the socket is shut down.
        """
        port_store32(&self.c.stopping, 1)
