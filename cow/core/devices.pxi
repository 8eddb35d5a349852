# The Python-visible devices: thin shells that check, call once without the GIL, and raise.

from cpython.buffer cimport (
    PyBUF_FULL_RO, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_FromContiguous,
    PyBuffer_IsContiguous, PyBuffer_Release, PyBuffer_ToContiguous, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport PyObject

import os

from cow.errors import (
    DeviceIOError, DeviceNotFound, ImageError, InvalidArgument, StoreError,
)

ORIGIN = FROM_ORIGIN
COW = FROM_COW
ZERO = FROM_ZERO


cdef enum:
    OP_READ
    OP_WRITE
    OP_READ_MANY
    OP_WRITE_MANY
    OP_DISCARD
    OP_FLUSH
    OP_MAP                          # EXTENTS with the caller's emit and context

cdef struct operation:
    int op
    uint8_t *data
    const uint64_t *offsets
    uint64_t offset
    uint64_t length                 # bytes; of each block in a batch
    uint64_t count                  # blocks
    uint64_t done                   # bytes, or blocks: where a suspended operation goes on
    emit_fn emit
    void *context


cdef int operation_run(device *d, operation *o) noexcept nogil:
    cdef bio b
    cdef int rc
    if d.removed:
        return -ENXIO
    if o.op == OP_READ:
        return request_read(d, o.data, o.offset, o.length, &o.done)
    if o.op == OP_WRITE:
        return request_write(d, o.data, o.offset, o.length, &o.done)
    if o.op == OP_READ_MANY:
        return request_read_many(d, o.data, o.offsets, o.count, o.length, &o.done)
    if o.op == OP_WRITE_MANY:
        return request_write_many(d, o.data, o.offsets, o.count, o.length, &o.done)
    if o.op == OP_FLUSH:
        return flush_device(d, 0, d.size)       # follows no exception: no map lock while it waits
    if o.op == OP_DISCARD:
        bio_init(&b, DISCARD, emit_discard, NULL)
    else:
        bio_init(&b, EXTENTS, o.emit, NULL)
        b.context = o.context
    rc = request(d, &b, o.offset, o.length)
    return -EOPNOTSUPP if rc == BIO_SHARED else rc      # a discard prepares nothing


@cython.final
cdef class Gate:
    """The lock around everything that can change between two requests; one for each mapper.

    As a context manager it is held exclusively: all requests are through, and new ones wait.
    """

    cdef gate g

    def __cinit__(self, bint power):
        port_rwlock_init(&self.g.lock)
        port_event_init(&self.g.changes)
        port_event_init(&self.g.events)
        self.g.power = power

    def __dealloc__(self):
        port_rwlock_destroy(&self.g.lock)

    @property
    def power(self):
        """Whether barriers reach the disk (durability "power")."""
        return self.g.power

    @property
    def event_nr(self):
        """How many events the devices of the mapper had, all together."""
        return port_event_count(&self.g.events)

    def raise_event(self):
        """Count an event that is no device's and wake who waits."""
        port_event_raise(&self.g.events)

    def wait_event(self, uint64_t event_nr, uint64_t milliseconds):
        """Wait until the count differs from `event_nr`, or so long; return the count."""
        cdef uint64_t now
        with nogil:
            now = port_event_wait(&self.g.events, event_nr, 1000 * milliseconds)
        return now

    def __enter__(self):
        with nogil:
            port_write_lock(&self.g.lock)
        return self

    def __exit__(self, *exc_info):
        port_write_unlock(&self.g.lock)
        port_event_raise(&self.g.changes)


cdef uint64_t nr_families = 0       # guarded by the GIL


@cython.final
cdef class Family:
    """An origin with its snapshots: the unit of locking and of copy-before-write.

    `members` is kept by the snapshot targets: all of them, loaded or live.
    """

    cdef family f
    cdef readonly BlockDevice origin
    cdef readonly list members

    def __cinit__(self, BlockDevice origin not None):
        global nr_families
        nr_families += 1
        self.origin = origin
        self.members = []
        self.f.number = nr_families
        self.f.origin = &origin.d
        port_rwlock_init(&self.f.map)
        pthread_mutex_init(&self.f.prepare, NULL)
        pthread_mutex_init(&self.f.commit, NULL)
        port_event_init(&self.f.merge_steps)
        port_event_init(&self.f.commits)
        port_event_init(&self.f.arrivals)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.f.commit)
        pthread_mutex_destroy(&self.f.prepare)
        port_rwlock_destroy(&self.f.map)
        free(self.f.snapshots)
        settled_free(&self.f.settled)

    @property
    def number(self):
        """The place of this family's map lock in the order of locks."""
        return self.f.number


cdef class BlockDevice:
    """What a table can name: an image or a mapped device. All I/O of both is here.

    Offsets and lengths are bytes. Reads past the end are short; a write that reaches past the end
    raises ENOSPC and writes nothing. While a device on the way is suspended, I/O waits.
    """

    cdef device d
    cdef readonly Gate gate
    cdef Family own_family
    cdef object __weakref__

    def __cinit__(self, Gate gate not None, *args, **kwargs):
        self.gate = gate
        self.d.gate = &gate.g
        self.d.fd = -1
        self.d.plain = True
        port_event_init(&self.d.events)
        pthread_mutex_init(&self.d.grow_mutex, NULL)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.d.grow_mutex)

    @property
    def size(self):
        """Bytes."""
        return self.d.size

    @property
    def sectors(self):
        """Size in sectors of 512 bytes."""
        return self.d.size // SECTOR

    @property
    def plain(self):
        """Whether no snapshot and no Python target lies below, so that no lock is needed."""
        return self.d.plain

    @property
    def family(self):
        """The family of this device as an origin, made when first asked for."""
        if self.own_family is None:
            self.own_family = Family(self)
            self.d.family = &self.own_family.f
        return self.own_family

    @property
    def readonly(self):
        """Whether writes are refused with EPERM."""
        return not self.d.writable

    @property
    def removed(self):
        """Whether the device is gone: all I/O raises ENXIO."""
        return self.d.removed

    cdef int perform(self, operation *o, str what) except -1:
        """Run an operation to its end, waiting while a device on the way is suspended."""
        cdef uint64_t seen
        cdef int rc
        while True:
            with nogil:
                port_use_begins()
                port_read_lock(&self.d.gate.lock)
                seen = port_event_count(&self.d.gate.changes)
                rc = operation_run(&self.d, o)
                port_read_unlock(&self.d.gate.lock)
                port_use_ends()
            if rc == 0:
                return 0
            if rc < 0:
                self.fail(rc, o, what)
            with nogil:
                port_event_wait(&self.d.gate.changes, seen, WAIT_SLICE)
            PyErr_CheckSignals()

    cdef int fail(self, int rc, operation *o, str what) except -1:
        if rc == -ENOMEM:
            raise MemoryError(f"{self}: no memory for a {what}")
        if rc == -ENXIO:
            raise DeviceNotFound(f"{self}: the device was removed")
        where = "" if o.op in (OP_FLUSH, OP_READ_MANY, OP_WRITE_MANY) else (
            f" of {o.length} bytes at {o.offset}")
        if o.op in (OP_READ_MANY, OP_WRITE_MANY):
            where = f" of {o.length} bytes at {o.offsets[o.done]} (block {o.done} of {o.count})"
        raise DeviceIOError(f"{self}: {what}{where} failed: {os.strerror(-rc)}", -rc)

    cdef uint64_t clip(self, int64_t offset, uint64_t length) except? <uint64_t>-1:
        """Return how much of a read lies inside the device."""
        if self.d.removed:
            raise DeviceNotFound(f"{self}: the device was removed")
        if offset < 0:
            raise InvalidArgument(f"{self}: offset {offset} is negative")
        if <uint64_t>offset >= self.d.size:
            return 0
        return min(length, self.d.size - <uint64_t>offset)

    cdef int check_write(self, int64_t offset, uint64_t length) except -1:
        """Refuse what a block device refuses before anything is written."""
        if offset < 0:
            raise InvalidArgument(f"{self}: offset {offset} is negative")
        if self.d.removed:
            raise DeviceNotFound(f"{self}: the device was removed")
        if not self.d.writable:
            raise DeviceIOError(f"{self}: the device is read-only", EPERM)
        if length and (<uint64_t>offset >= self.d.size or length > self.d.size - <uint64_t>offset):
            raise DeviceIOError(
                f"{self}: {length} bytes at {offset} reach past the end, "
                f"the device has {self.d.size} bytes", ENOSPC)
        return 0

    def pread(self, Py_ssize_t size, int64_t offset):
        """Read up to `size` bytes at `offset` and return them; fewer at the end of the device."""
        cdef operation o
        cdef object result
        if size < 0:
            raise InvalidArgument(f"{self}: size {size} is negative")
        memset(&o, 0, sizeof(o))
        o.op = OP_READ
        o.offset = <uint64_t>offset
        o.length = self.clip(offset, <uint64_t>size)
        result = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>o.length)
        if o.length:
            o.data = <uint8_t *>PyBytes_AS_STRING(result)
            self.perform(&o, "read")
        return result

    def preadinto(self, buffer, int64_t offset):
        """Fill `buffer` from `offset` and return the bytes read; fewer at the end of the device.

        The buffer may be strided; a read-only one is refused with BufferError.
        """
        cdef Py_buffer view
        cdef operation o
        cdef bytes packed
        PyObject_GetBuffer(buffer, &view, PyBUF_FULL_RO)
        try:
            if view.readonly:
                raise BufferError("the buffer is read-only")
            memset(&o, 0, sizeof(o))
            o.op = OP_READ
            o.offset = <uint64_t>offset
            o.length = self.clip(offset, <uint64_t>view.len)
            if o.length == 0:
                return 0
            if PyBuffer_IsContiguous(&view, b"C"):
                o.data = <uint8_t *>view.buf
                self.perform(&o, "read")
            else:
                packed = self.pread(<Py_ssize_t>o.length, offset)
                PyBuffer_FromContiguous(
                    &view, PyBytes_AS_STRING(packed), <Py_ssize_t>o.length, b"C")
        finally:
            PyBuffer_Release(&view)
        return o.length

    def pwrite(self, data, int64_t offset):
        """Write all of `data` at `offset` and return its length in bytes.

        When it returns, the write and what it had to copy out survive what the mapper's durability
        says; the data itself survives a power cut after flush().
        """
        cdef Py_buffer view
        cdef operation o
        cdef bytes packed
        PyObject_GetBuffer(data, &view, PyBUF_FULL_RO)
        try:
            self.check_write(offset, <uint64_t>view.len)
            memset(&o, 0, sizeof(o))
            o.op = OP_WRITE
            o.offset = <uint64_t>offset
            o.length = <uint64_t>view.len
            if PyBuffer_IsContiguous(&view, b"C"):
                o.data = <uint8_t *>view.buf
            else:
                packed = PyBytes_FromStringAndSize(NULL, view.len)
                PyBuffer_ToContiguous(PyBytes_AS_STRING(packed), &view, view.len, b"C")
                o.data = <uint8_t *>PyBytes_AS_STRING(packed)
            if o.length:
                self.perform(&o, "write")
        finally:
            PyBuffer_Release(&view)
        return o.length

    def write_zeroes(self, int64_t offset, int64_t length):
        """Write `length` zeros at `offset`."""
        cdef operation o
        if length < 0:
            raise InvalidArgument(f"{self}: length {length} is negative")
        self.check_write(offset, <uint64_t>length)
        memset(&o, 0, sizeof(o))
        o.op = OP_WRITE
        o.offset = <uint64_t>offset
        o.length = <uint64_t>length
        if length:
            self.perform(&o, "write")

    def discard(self, int64_t offset, int64_t length):
        """Discard a range, cut to the device; EOPNOTSUPP where a target on the way has none."""
        cdef operation o
        if length < 0:
            raise InvalidArgument(f"{self}: length {length} is negative")
        self.check_write(offset, 0)
        if not self.supports_discard:
            raise DeviceIOError(f"{self}: discard is not supported by its table", EOPNOTSUPP)
        memset(&o, 0, sizeof(o))
        o.op = OP_DISCARD
        o.offset = <uint64_t>offset
        o.length = self.clip(offset, <uint64_t>length)
        if o.length:
            self.perform(&o, "discard")

    @property
    def supports_discard(self):
        """Whether every target on the way down takes discards."""
        return True

    def flush(self):
        """Return when all that was written to the device is on the disk."""
        cdef operation o
        memset(&o, 0, sizeof(o))
        o.op = OP_FLUSH
        self.perform(&o, "flush")

    def read_many(self, offsets, Py_ssize_t size, out=None):
        """Read a block of `size` bytes at each of `offsets` (bytes) in one call.

        Return uint8[n, size], or fill `out` of that shape. Blocks must lie inside the device.
        """
        import numpy

        if size < 0:
            raise InvalidArgument(f"{self}: size {size} is negative")
        offsets = numpy.ascontiguousarray(offsets, dtype=numpy.uint64).reshape(-1)
        if out is None:
            out = numpy.empty((len(offsets), size), dtype=numpy.uint8)
        elif out.shape != (len(offsets), size) or out.dtype != numpy.uint8:
            raise ValueError(f"out is {out.dtype}{out.shape}, not uint8[{len(offsets)}, {size}]")
        elif not out.flags.writeable:
            raise BufferError("out is read-only")
        into = out if out.flags.c_contiguous else numpy.empty(out.shape, dtype=numpy.uint8)
        self.batch(OP_READ_MANY, offsets, into, size)
        if into is not out:
            out[...] = into
        return out

    def write_many(self, offsets, data):
        """Write data[i] at offsets[i] (bytes) for every i, in order, in one call.

        `data` is uint8[n, size]. Nothing is written unless every block lies inside the device; at
        an error the blocks before it are written. All copies that snapshots need are committed
        together, with one pair of barriers for the lot.
        """
        import numpy

        offsets = numpy.ascontiguousarray(offsets, dtype=numpy.uint64).reshape(-1)
        data = numpy.ascontiguousarray(data)
        if data.dtype != numpy.uint8 or data.ndim != 2 or len(data) != len(offsets):
            raise ValueError(f"data is {data.dtype}{data.shape}, not uint8[{len(offsets)}, size]")
        self.check_write(0, 0)
        self.batch(OP_WRITE_MANY, offsets, data, data.shape[1])

    cdef int batch(self, int op, offsets, data, Py_ssize_t size) except -1:
        cdef const uint64_t[::1] where = offsets
        cdef Py_buffer view
        cdef operation o
        cdef Py_ssize_t i
        if where.shape[0] == 0 or size == 0:
            return 0
        for i in range(where.shape[0]):
            if where[i] >= self.d.size or <uint64_t>size > self.d.size - where[i]:
                raise DeviceIOError(
                    f"{self}: block {i}, {size} bytes at {where[i]}, reaches past the end, "
                    f"the device has {self.d.size} bytes",
                    ENOSPC if op == OP_WRITE_MANY else EINVAL)
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            memset(&o, 0, sizeof(o))
            o.op = op
            o.data = <uint8_t *>view.buf
            o.offsets = &where[0]
            o.count = <uint64_t>where.shape[0]
            o.length = <uint64_t>size
            self.perform(&o, "read" if op == OP_READ_MANY else "write")
        finally:
            PyBuffer_Release(&view)
        return 0

    def extents(self, int64_t offset=0, length=None):
        """Tell where the bytes of a range come from, without reading them.

        Return an array with the fields offset and length (bytes), source: ORIGIN (what lies below,
        no snapshot or not copied yet), COW (the store of the uppermost snapshot) or ZERO (a zero
        target), and zero: true where nothing but zeros can be read, a hole in an image included.
        Neighbours that are alike are one extent.
        """
        import numpy

        cdef extents found
        cdef operation o
        cdef uint64_t size = self.clip(
            offset, self.d.size if length is None else <uint64_t>max(0, length))
        memset(&found, 0, sizeof(found))
        memset(&o, 0, sizeof(o))
        o.op = OP_MAP
        o.offset = <uint64_t>offset
        o.length = size
        o.emit = emit_extent
        o.context = &found
        dtype = numpy.dtype({
            "names": ["offset", "length", "source", "zero"],
            "formats": ["<u8", "<u8", "u1", "?"],
            "offsets": [0, 8, 16, 17],
            "itemsize": sizeof(extent),
        })
        try:
            if size:
                self.perform_extents(&o, &found)
            result = numpy.empty(found.count, dtype=dtype)
            if found.count:
                copy_out(result, found.items, found.count * sizeof(extent))
        finally:
            free(found.items)
        return result

    cdef int perform_extents(self, operation *o, extents *found) except -1:
        found.start = o.offset
        self.perform(o, "look")
        return 0

    def view(self, int64_t offset=0, size=None):
        """Return a read-only memoryview of a range, without a copy.

        Only for ranges that lie in one piece in one image with no snapshot in between: elsewhere
        the next write could move the bytes. While a view is out its image stays mapped.
        """
        cdef operation o
        cdef run found
        cdef ImageView result
        cdef uint64_t length = self.clip(
            offset, self.d.size if size is None else <uint64_t>max(0, size))
        if not self.d.plain or not length:
            reason = "nothing is there" if self.d.plain else "a snapshot lies on the way"
            raise DeviceIOError(
                f"{self}: no view of {length} bytes at {offset}: {reason}", EOPNOTSUPP)
        memset(&found, 0, sizeof(found))
        memset(&o, 0, sizeof(o))
        o.op = OP_MAP
        o.offset = <uint64_t>offset
        o.length = length
        o.emit = emit_run
        o.context = &found
        self.perform(&o, "look")
        if found.runs != 1:
            raise DeviceIOError(
                f"{self}: no view of {length} bytes at {offset}: they lie in {found.runs} pieces",
                EOPNOTSUPP)
        result = ImageView.__new__(ImageView)
        result.open(self.image_of(<void *>found.image), found.offset, length)
        return memoryview(result)

    cdef FileDevice image_of(self, void *image):
        """Return the object of an image found below."""
        raise NotImplementedError


cdef class FileDevice(BlockDevice):
    """An image: a file, mmap'd as a whole. cow.image.Image opens and locks it."""

    cdef readonly int exports
    cdef bint closing
    cdef size_t mapped
    cdef list replaced              # (address, size) of mappings a reopening left behind

    def attach(self, int fd, uint64_t size, uint64_t file_size, bint writable, bint sparse):
        """Map `size` bytes of the open file `fd`, whose descriptor stays the caller's.

        Called again with a writable descriptor it replaces a read-only mapping, with a larger size
        a smaller one. The gate is held exclusively then.
        """
        cdef statfs status
        cdef void *base
        cdef int protection
        cdef int rc = port_install_sigbus()
        if rc:
            raise ImageError(f"{self}: no SIGBUS handler: {os.strerror(-rc)}", -rc)
        protection = PROT_READ
        if writable:
            protection |= PROT_WRITE
        base = mmap(NULL, size, protection, MAP_SHARED | MAP_NORESERVE, fd, 0)
        if base == MAP_FAILED:
            rc = errno
            raise ImageError(f"{self}: cannot map {size} bytes: {os.strerror(rc)}", rc)
        if self.d.base != NULL:
            # Views may still look at it, so it goes when the image goes.
            if self.replaced is None:
                self.replaced = []
            self.replaced.append((<size_t>self.d.base, self.mapped))
        self.d.base = <uint8_t *>base
        self.mapped = size
        self.d.fd = fd
        self.d.size = size
        self.d.file_size = file_size
        self.d.writable = writable
        self.d.sparse = <uint32_t>sparse
        self.d.on_disk = fstatfs(fd, &status) == 0 and status.f_type != TMPFS_MAGIC

    def detach(self):
        """Unmap. While views are out this waits for the last of them."""
        self.d.removed = True
        self.d.size = 0
        self.d.fd = -1
        self.closing = True
        if self.exports == 0:
            self.unmap()

    cdef void unmap(self):
        if self.d.base != NULL:
            munmap(self.d.base, self.mapped)
            self.d.base = NULL
        if self.replaced is not None:
            for address, size in self.replaced:
                munmap(<void *><size_t>address, size)
            self.replaced = None

    def __dealloc__(self):
        # Views hold a reference, so none is out here.
        self.unmap()

    @property
    def writable(self):
        """Whether the image is mapped for writing."""
        return self.d.writable

    @property
    def sparse(self):
        """Whether the file has holes or grows on demand."""
        return bool(port_load32(&self.d.sparse))

    cdef FileDevice image_of(self, void *image):
        return self


@cython.final
cdef class ImageView:
    """Exports a range of an image through the buffer protocol, read-only."""

    cdef FileDevice image
    cdef uint8_t *start
    cdef Py_ssize_t size

    cdef void open(self, FileDevice image, uint64_t offset, uint64_t size):
        self.image = image
        self.start = image.d.base + offset
        self.size = <Py_ssize_t>size
        image.exports += 1

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.start, self.size, 1, flags)

    def __dealloc__(self):
        if self.image is not None:
            self.image.exports -= 1
            if self.image.exports == 0 and self.image.closing:
                self.image.unmap()


cdef class MappedDevice(BlockDevice):
    """A device with a live table. cow.device.Device gives it its life cycle.

    Everything that changes it here is called with the gate held exclusively.
    """

    cdef Map live_map

    def __cinit__(self, *args, **kwargs):
        self.d.mapped = True
        self.d.writable = True

    def set_map(self, Map live):
        """Put a map in place of the present one (None: no table)."""
        self.live_map = live
        self.d.live = &live.t if live is not None else NULL
        self.d.size = live.t.ends[live.t.nr_targets - 1] if live is not None else 0

    def set_state(self, *, suspended=None, readonly=None, removed=None):
        """Set what requests look at."""
        if suspended is not None:
            self.d.suspended = suspended
        if readonly is not None:
            self.d.writable = not readonly
        if removed is not None:
            self.d.removed = removed

    def set_locks(self, families, bint plain):
        """Tell which families lie below: their map locks are what a request here takes."""
        cdef Family f
        cdef family **locks = NULL
        families = sorted(families, key=lambda f: f.number)
        if families:
            locks = <family **>malloc(<size_t>len(families) * sizeof(family *))
            if locks == NULL:
                raise MemoryError
        for i, f in enumerate(families):
            locks[<int>i] = &f.f
        free(self.d.locks)
        self.d.locks = locks
        self.d.nr_locks = <int>len(families)
        self.d.plain = plain

    def __dealloc__(self):
        free(self.d.locks)

    @property
    def suspended(self):
        """Whether I/O waits."""
        return self.d.suspended

    @property
    def event_nr(self):
        """How many events there were: invalidations, a leg that failed, renames, a uuid set."""
        return port_event_count(&self.d.events)

    def raise_event(self):
        """Count an event and wake who waits."""
        device_event(&self.d)

    def wait_event(self, uint64_t event_nr, uint64_t milliseconds):
        """Wait until the event counter differs from `event_nr`, or so long; return the counter."""
        cdef uint64_t now
        with nogil:
            now = port_event_wait(&self.d.events, event_nr, 1000 * milliseconds)
        return now

    cdef FileDevice image_of(self, void *image):
        cdef TargetMap t
        cdef BlockDevice below
        for t in self.live_map.targets:
            for below in t.devices:
                if <void *>&below.d == image:
                    return below
                if isinstance(below, MappedDevice):
                    found = below.image_of(image)
                    if found is not None:
                        return found
        return None
