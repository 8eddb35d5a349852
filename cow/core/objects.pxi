# The Python-visible classes: thin shells that check, call once without the GIL, and raise.

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
    return request(d, &b, o.offset, o.length)


@cython.final
cdef class Gate:
    """The lock around everything that can change between two requests; one for each mapper.

    As a context manager it is held exclusively: all requests are through, and new ones wait.
    """

    cdef gate g

    def __cinit__(self, bint power):
        port_rwlock_init(&self.g.lock)
        port_event_init(&self.g.changes)
        self.g.power = power

    def __dealloc__(self):
        port_event_destroy(&self.g.changes)
        port_rwlock_destroy(&self.g.lock)

    @property
    def power(self):
        """Whether barriers reach the disk (durability "power")."""
        return self.g.power

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

    def __dealloc__(self):
        port_event_destroy(&self.f.merge_steps)
        pthread_mutex_destroy(&self.f.commit)
        pthread_mutex_destroy(&self.f.prepare)
        port_rwlock_destroy(&self.f.map)
        free(self.f.snapshots)

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
        port_event_destroy(&self.d.events)

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
    def removed(self):
        """Whether the device is gone: all I/O raises ENXIO."""
        return self.d.removed

    cdef int perform(self, operation *o, str what) except -1:
        """Run an operation to its end, waiting while a device on the way is suspended."""
        cdef uint64_t seen
        cdef int rc
        while True:
            with nogil:
                port_read_lock(&self.d.gate.lock)
                seen = port_event_count(&self.d.gate.changes)
                rc = operation_run(&self.d, o)
                port_read_unlock(&self.d.gate.lock)
            if rc == 0:
                return 0
            if rc < 0:
                self.fail(rc, o, what)
            with nogil:
                port_event_wait(&self.d.gate.changes, seen, 100)
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
                PyBuffer_FromContiguous(&view, PyBytes_AS_STRING(packed), <Py_ssize_t>o.length, b"C")
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
        """Discard a range, cut to the device; EOPNOTSUPP where a target on the way has no discard."""
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

        `data` is uint8[n, size]. Nothing is written unless every block lies inside the device; at an
        error the blocks before it are written. All copies that snapshots need are committed
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
            raise DeviceIOError(
                f"{self}: no view of {length} bytes at {offset}: "
                + ("nothing is there" if self.d.plain else "a snapshot lies on the way"), EOPNOTSUPP)
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


cdef struct extent:
    uint64_t offset
    uint64_t length
    uint8_t source
    uint8_t zero
    uint8_t pad[6]

cdef struct extents:
    extent *items
    uint64_t count
    uint64_t capacity
    uint64_t start

cdef struct run:
    uint64_t runs
    device *image
    uint64_t offset
    uint64_t length


cdef int emit_run(bio *b, device *image, uint64_t offset, uint64_t length) noexcept nogil:
    """Count the pieces a range lies in; neighbours of one image are one piece."""
    cdef run *r = <run *>b.context
    b.done += length
    if r.runs and image == r.image and image != NULL and offset == r.offset + r.length:
        r.length += length
        return 0
    r.runs += 1 if image != NULL else 2
    r.image = image
    r.offset = offset
    r.length = length
    return 0


cdef int emit_extent(bio *b, device *image, uint64_t offset, uint64_t length) noexcept nogil:
    """Append a run to the extents, cut at the holes of the image."""
    cdef int source = FROM_ORIGIN if b.source == FROM_NOWHERE else b.source
    cdef int64_t data, hole
    cdef uint64_t n
    cdef int rc = 0
    if image == NULL or not image.sparse:
        rc = extents_append(b, length, FROM_ZERO if image == NULL else source, image == NULL)
        b.done += length
        return rc
    while length and rc == 0:
        data = lseek(image.fd, <int64_t>offset, SEEK_DATA)
        if data < 0 and errno == ENXIO:
            data = <int64_t>(offset + length)
        elif data < 0:
            data = <int64_t>offset
        if <uint64_t>data > offset:
            n = min(length, <uint64_t>data - offset)
            rc = extents_append(b, n, source, True)
        else:
            hole = lseek(image.fd, <int64_t>offset, SEEK_HOLE)
            n = min(length, <uint64_t>hole - offset) if hole > <int64_t>offset else length
            rc = extents_append(b, n, source, False)
        b.done += n
        offset += n
        length -= n
    return rc


cdef int extents_append(bio *b, uint64_t length, int source, bint zero) noexcept nogil:
    cdef extents *e = <extents *>b.context
    cdef uint64_t capacity
    cdef void *items
    cdef extent *last
    if e.count:
        last = &e.items[e.count - 1]
        if last.source == source and last.zero == zero:
            last.length += length
            return 0
    if e.count == e.capacity:
        capacity = max(<uint64_t>64, 2 * e.capacity)
        items = realloc(e.items, capacity * sizeof(extent))
        if items == NULL:
            return -ENOMEM
        e.items = <extent *>items
        e.capacity = capacity
    last = &e.items[e.count]
    last.offset = e.start + b.done
    last.length = length
    last.source = <uint8_t>source
    last.zero = zero
    e.count += 1
    return 0


cdef int copy_out(object buffer, void *source, size_t size) except -1:
    cdef Py_buffer view
    PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
    memcpy(view.buf, source, size)
    PyBuffer_Release(&view)
    return 0


cdef class FileDevice(BlockDevice):
    """An image: a file, mmap'd as a whole. cow.image.Image opens and locks it."""

    cdef readonly int exports
    cdef bint closing
    cdef size_t mapped
    cdef list replaced              # (address, size) of mappings a reopening left behind

    def attach(self, int fd, uint64_t size, uint64_t file_size, bint writable, bint sparse):
        """Map `size` bytes of the open file `fd`, whose descriptor stays the caller's.

        Called again with a writable descriptor it replaces a read-only mapping. The gate is held
        exclusively then.
        """
        cdef void *base
        cdef int rc = port_install_sigbus()
        if rc:
            raise ImageError(f"{self}: no SIGBUS handler: {os.strerror(-rc)}", -rc)
        base = mmap(NULL, size, PROT_READ | (PROT_WRITE if writable else 0),
                    MAP_SHARED | MAP_NORESERVE, fd, 0)
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
        self.d.sparse = sparse

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
        return self.d.sparse

    @property
    def readonly(self):
        """Whether writes are refused with EPERM."""
        return not self.d.writable

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
            locks = <family **>malloc(len(families) * sizeof(family *))
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
    def readonly(self):
        """Whether writes are refused with EPERM."""
        return not self.d.writable

    @property
    def event_nr(self):
        """How many events there were: invalidations, renames, a uuid set."""
        return port_event_count(&self.d.events)

    def raise_event(self):
        """Count an event and wake who waits."""
        port_event_raise(&self.d.events)

    def wait_event(self, uint64_t event_nr, long milliseconds):
        """Wait until the event counter differs from `event_nr`, or for so long; return the counter."""
        cdef uint64_t now
        with nogil:
            now = port_event_wait(&self.d.events, event_nr, milliseconds)
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


@cython.final
cdef class Map:
    """The compiled form of a table: its targets in order, without gaps."""

    cdef table t
    cdef readonly tuple targets

    def __cinit__(self, targets):
        cdef TargetMap line
        cdef int i
        self.targets = tuple(targets)
        self.t.nr_targets = <int>len(self.targets)
        self.t.targets = <target **>malloc(self.t.nr_targets * sizeof(void *))
        self.t.ends = <uint64_t *>malloc(self.t.nr_targets * sizeof(uint64_t))
        if self.t.targets == NULL or self.t.ends == NULL:
            raise MemoryError
        for i in range(self.t.nr_targets):
            line = self.targets[i]
            self.t.targets[i] = &line.t
            self.t.ends[i] = line.t.start + line.t.length

    def __dealloc__(self):
        free(self.t.targets)
        free(self.t.ends)


cdef class TargetMap:
    """The core side of one table line. Starts and lengths are sectors here."""

    cdef target t
    cdef readonly tuple devices
    cdef object __weakref__

    def __cinit__(self, uint64_t start, uint64_t length, *args, **kwargs):
        self.t.start = start * SECTOR
        self.t.length = length * SECTOR
        self.devices = ()


@cython.final
cdef class Linear(TargetMap):
    """A range of a device; `dev_start` in sectors."""

    def __init__(self, start, length, BlockDevice dev not None, uint64_t dev_start):
        self.devices = (dev,)
        self.t.map = linear_map
        self.t.dev = &dev.d
        self.t.dev_start = dev_start * SECTOR


@cython.final
cdef class Striped(TargetMap):
    """Chunks of `chunk_size` sectors over (device, start sector) legs in turn."""

    def __init__(self, start, length, uint64_t chunk_size, legs):
        cdef BlockDevice dev
        cdef int i
        self.devices = tuple([leg[0] for leg in legs])
        self.t.map = striped_map
        self.t.chunk_size = chunk_size * SECTOR
        self.t.nr_stripes = len(legs)
        self.t.stripes = <stripe *>malloc(len(legs) * sizeof(stripe))
        if self.t.stripes == NULL:
            raise MemoryError
        for i in range(len(legs)):
            dev, dev_start = legs[i]
            self.t.stripes[i].dev = &dev.d
            self.t.stripes[i].start = dev_start * SECTOR

    def __dealloc__(self):
        free(self.t.stripes)


@cython.final
cdef class Zero(TargetMap):
    """Reads zeros, forgets writes."""

    def __init__(self, start, length):
        self.t.map = zero_map


@cython.final
cdef class Error(TargetMap):
    """Fails everything with EIO."""

    def __init__(self, start, length):
        self.t.map = error_map


cdef class FilterTarget(TargetMap):
    """A linear target that asks Python about every request: the way to write a target in Python.

    start(op, sector, nr_sectors) is called before, with op "read", "write", "discard" or "flush". It
    may sleep, raise an OSError (the request fails with its errno), or return PASS, DROP or MANGLE;
    after MANGLE, mangle(op, data) may change the bytes in a writable memoryview.
    """

    PASS = FILTER_PASS
    DROP = FILTER_DROP
    MANGLE = FILTER_MANGLE

    def __init__(self, start, length, BlockDevice dev not None, uint64_t dev_start, *args, **kwargs):
        self.devices = (dev,)
        self.t.map = filter_map
        self.t.dev = &dev.d
        self.t.dev_start = dev_start * SECTOR
        self.t.object = <void *>self

    def start(self, op, sector, nr_sectors):
        """Decide about a request before it is passed down."""
        return FILTER_PASS

    def mangle(self, op, data):
        """Change the data of a read on its way up, or of a write on its way down."""


cdef str op_name(int op):
    return {READ: "read", WRITE: "write", DISCARD: "discard", FLUSH: "flush"}[op]


cdef int filter_ask(target *t, int op, uint64_t offset, uint64_t length) noexcept with gil:
    try:
        return (<FilterTarget>t.object).start(
            op_name(op), (offset - t.start) // SECTOR, length // SECTOR)
    except OSError as error:
        return -(error.errno or EIO)
    except BaseException:
        return -EIO


cdef int filter_mangle(target *t, int op, uint8_t *data, uint64_t length) noexcept with gil:
    try:
        (<FilterTarget>t.object).mangle(op_name(op), <uint8_t[:length]>data)
        return 0
    except OSError as error:
        return -(error.errno or EIO)
    except BaseException:
        return -EIO


@cython.final
cdef class Origin(TargetMap):
    """snapshot-origin: copies out for the snapshots of `dev` before it is written."""

    def __init__(self, start, length, BlockDevice dev not None):
        self.devices = (dev,)
        dev.family
        self.t.map = origin_map
        self.t.dev = &dev.d


cdef dict FAULTS = {
    FAULT_OLD_RANGE: "old chunk {old} is past the end of the origin, which has {nr_old} chunks",
    FAULT_NEW_RANGE: "new chunk {new} is past the end of the store, which has {nr_new} chunks",
    FAULT_METADATA: "new chunk {new} is a metadata area",
    FAULT_OLD_TWICE: "old chunk {old} has an exception already",
    FAULT_NEW_TWICE: "new chunk {new} is used by another exception",
}


@cython.final
cdef class ExceptionStore:
    """A COW store on a device: persistent (P, PO) or transient (N).

    It has no chunk size until configure(); what a handover destination holds stays like that.
    """

    cdef store st
    cdef readonly BlockDevice cow

    def __cinit__(self, BlockDevice cow not None, *, bint persistent, bint overflow_supported=False):
        self.cow = cow
        self.st.cow = &cow.d
        self.st.persistent = persistent
        self.st.overflow_supported = overflow_supported
        self.st.valid = 1

    def __dealloc__(self):
        store_free(&self.st)

    cdef int check(self, int rc, str what) except -1:
        if rc == -ENOMEM:
            raise MemoryError("Unable to allocate hash table space")
        if rc == BIO_SUSPENDED:
            raise StoreError(f"{self.cow}: {what}: the device is suspended", EINVAL)
        if rc:
            raise StoreError(f"{self.cow}: {what}: {os.strerror(-rc)}", -rc)
        return 0

    def configure(self, uint64_t chunk_size, uint64_t origin_size):
        """Set the chunk size (sectors, a power of 2) and reserve the exception table.

        `origin_size` in bytes: the table has room for every chunk of the origin.
        """
        cdef uint64_t size = chunk_size * SECTOR
        self.check(
            store_configure(&self.st, <int>size.bit_length() - 1, (origin_size + size - 1) // size),
            "exception table")

    def format(self):
        """Write a fresh store: area 0 zeroed, then the header."""
        cdef int rc
        with nogil:
            port_read_lock(&self.st.cow.gate.lock)
            rc = store_format(&self.st)
            port_read_unlock(&self.st.cow.gate.lock)
        self.check(rc, "cannot write the header and the first area")

    def load(self):
        """Read every committed exception; StoreError for a record that cannot be right."""
        cdef load_fault fault
        cdef int rc
        memset(&fault, 0, sizeof(fault))
        with nogil:
            port_read_lock(&self.st.cow.gate.lock)
            rc = store_load(&self.st, &fault)
            port_read_unlock(&self.st.cow.gate.lock)
        if fault.kind != FAULT_NONE:
            text = FAULTS[fault.kind].format(
                old=fault.found.old_chunk, new=fault.found.new_chunk,
                nr_old=self.st.exceptions.nr_chunks, nr_new=self.st.cow.size >> self.st.chunk_shift)
            raise StoreError(
                f"{self.cow}: area {fault.area}, record {fault.index}: {text}", EINVAL)
        self.check(rc, "cannot read the metadata areas")

    @property
    def persistent(self):
        """Whether exceptions are recorded on the device."""
        return self.st.persistent

    @property
    def letters(self):
        """P, PO or N, as a table prints it."""
        if not self.st.persistent:
            return "N"
        return "PO" if self.st.overflow_supported else "P"

    @property
    def chunk_size(self):
        """Sectors; 0 while none is set."""
        return chunk_bytes(&self.st) // SECTOR if self.st.chunk_shift else 0

    @property
    def valid(self):
        """Whether the snapshot can be read."""
        return bool(port_load32(&self.st.valid))

    @valid.setter
    def valid(self, bint valid):
        port_store32(&self.st.valid, valid)

    @property
    def overflowed(self):
        """Whether a write found no room ("PO"): reads go on, writes fail."""
        return bool(port_load32(&self.st.overflowed))

    @property
    def nr_exceptions(self):
        """Exceptions held, pending ones included."""
        return self.st.exceptions.count

    @property
    def usage(self):
        """(allocated, total, metadata) in sectors, as the status line prints them."""
        cdef uint64_t chunk = chunk_bytes(&self.st) // SECTOR if self.st.chunk_shift else 0
        metadata = (port_load64(&self.st.area) + 2) * chunk if self.st.persistent else 0
        return port_load64(&self.st.next_free) * chunk, self.st.cow.size // SECTOR, metadata


@cython.final
cdef class Snapshot(TargetMap):
    """snapshot and snapshot-merge. `store` is replaced by handover, under the gate."""

    cdef snapshot s
    cdef readonly Family family
    cdef readonly ExceptionStore store
    cdef readonly bint merging
    cdef BlockDevice owner

    def __init__(
        self, start, length, BlockDevice origin not None, ExceptionStore store not None, *,
        bint merging=False, bint discard_zeroes_cow=False, bint discard_passdown_origin=False,
    ):
        # The COW device comes first, as the kernel lists them: it was opened last.
        self.devices = (store.cow, origin)
        self.family = origin.family
        self.merging = merging
        self.t.map = merge_map if merging else snapshot_map
        self.t.dev = &origin.d
        self.t.snapshot = &self.s
        self.s.family = &self.family.f
        self.s.origin = &origin.d
        self.s.end = self.t.start + self.t.length
        self.s.merging = merging
        self.s.discard_zeroes_cow = discard_zeroes_cow
        self.s.discard_passdown_origin = discard_passdown_origin
        self.use_store(store)

    cdef void use_store(self, ExceptionStore store):
        self.store = store
        self.s.store = &store.st

    def __dealloc__(self):
        free(self.s.window)

    @property
    def active(self):
        """Whether origin writes are copied out for it: from its first resume on."""
        return self.s.active

    def activate(self, BlockDevice owner not None):
        """Get origin writes from now on, in the kernel's order: largest chunk first.

        `owner` is the device told when the snapshot becomes invalid. Gate held exclusively.
        """
        cdef family *f = &self.family.f
        cdef snapshot **snapshots
        cdef int i
        self.deactivate()
        snapshots = <snapshot **>realloc(
            f.snapshots, (f.nr_snapshots + 1) * sizeof(void *))
        if snapshots == NULL:
            raise MemoryError
        f.snapshots = snapshots
        i = f.nr_snapshots
        while i > 0 and snapshots[i - 1].store.chunk_shift < self.s.store.chunk_shift:
            snapshots[i] = snapshots[i - 1]
            i -= 1
        snapshots[i] = &self.s
        f.nr_snapshots += 1
        self.s.active = True
        self.owner = owner
        self.s.owner = &owner.d

    def deactivate(self):
        """Get no origin writes any more. The gate is held exclusively."""
        cdef family *f = &self.family.f
        cdef int i, kept = 0
        for i in range(f.nr_snapshots):
            if f.snapshots[i] != &self.s:
                f.snapshots[kept] = f.snapshots[i]
                kept += 1
        f.nr_snapshots = kept
        self.s.active = False
        self.s.owner = NULL
        self.owner = None

    def hand_over(self, Snapshot source not None):
        """Take over the store of `source`, which is left with this one's, invalid.

        The letter P or PO is that of the new table. The gate is held exclusively.
        """
        cdef ExceptionStore mine = self.store, theirs = source.store
        cdef uint64_t needed
        theirs.st.overflow_supported, mine.st.overflow_supported = (
            mine.st.overflow_supported, theirs.st.overflow_supported)
        if theirs.st.chunk_shift:
            needed = (max(self.s.end, self.s.origin.size) + chunk_bytes(&theirs.st) - 1
                      ) >> theirs.st.chunk_shift
            if exception_table_extend(&theirs.st.exceptions, needed):
                raise MemoryError("Unable to allocate hash table space")
        mine.st.valid = 0
        self.use_store(theirs)
        source.use_store(mine)

    @property
    def merge_failed(self):
        """Whether a merge stopped on an error."""
        return bool(port_load32(&self.s.merge_failed))

    def merge(self):
        """Merge one step: True if there is more. Raises DeviceIOError when the merge fails.

        While a device on the way is suspended it answers None after a short wait.
        """
        cdef int rc
        cdef uint64_t seen
        with nogil:
            port_read_lock(&self.s.origin.gate.lock)
            seen = port_event_count(&self.s.origin.gate.changes)
            rc = merge_step(&self.s)
            port_read_unlock(&self.s.origin.gate.lock)
            if rc == BIO_SUSPENDED:
                port_event_wait(&self.s.origin.gate.changes, seen, 100)
        if rc == BIO_SUSPENDED:
            return None
        if rc < 0:
            raise DeviceIOError(
                f"{self.owner}: merge of {self.store.cow} failed: {os.strerror(-rc)}", -rc)
        return rc == 1

    def lookup_many(self, chunks):
        """Return the store chunk of each origin chunk, 2^64 - 1 where there is no exception.

        Both are uint64 arrays.
        """
        import numpy

        cdef const uint64_t[::1] old = numpy.ascontiguousarray(chunks, dtype=numpy.uint64)
        result = numpy.empty(old.shape[0], dtype=numpy.uint64)
        cdef uint64_t[::1] new = result
        cdef uint64_t entry
        cdef Py_ssize_t i
        with nogil:
            port_read_lock(&self.s.origin.gate.lock)
            port_read_lock(&self.s.family.map)
            for i in range(old.shape[0]):
                entry = exception_find(&self.s.store.exceptions, old[i])
                new[i] = entry_chunk(entry) if entry_complete(entry) else <uint64_t>-1
            port_read_unlock(&self.s.family.map)
            port_read_unlock(&self.s.origin.gate.lock)
        return result
