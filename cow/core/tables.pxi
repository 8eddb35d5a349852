# The Python-visible core of a table: a map, and an object for each target.

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
        self.t.targets = <target **>malloc(<size_t>self.t.nr_targets * sizeof(void *))
        self.t.ends = <uint64_t *>malloc(<size_t>self.t.nr_targets * sizeof(uint64_t))
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
        cdef uint64_t dev_start
        cdef int i
        self.devices = tuple([leg[0] for leg in legs])
        self.t.map = striped_map
        self.t.chunk_size = chunk_size * SECTOR
        self.t.nr_stripes = <uint64_t>len(legs)
        self.t.stripes = <stripe *>malloc(self.t.nr_stripes * sizeof(stripe))
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

    start(op, offset, length) is called before, with op "read", "write", "discard" or "flush" and
    bytes counted from the start of the target. It may sleep, raise an OSError (the request fails
    with its errno), or return PASS, DROP or MANGLE; after MANGLE, mangle(op, offset, data) sees the
    bytes in a writable memoryview, a write's before they are written, and may change them.
    """

    PASS = FILTER_PASS
    DROP = FILTER_DROP
    MANGLE = FILTER_MANGLE

    def __init__(
        self, start, length, BlockDevice dev not None, uint64_t dev_start, *args, **kwargs
    ):
        self.devices = (dev,)
        self.t.map = filter_map
        self.t.dev = &dev.d
        self.t.dev_start = dev_start * SECTOR
        self.t.object = <void *>self

    def start(self, op, offset, length):
        """Decide about a request before it is passed down."""
        return FILTER_PASS

    def mangle(self, op, offset, data):
        """Change the data of a read on its way up, or of a write on its way down."""


cdef str op_name(int op):
    return {READ: "read", WRITE: "write", DISCARD: "discard", FLUSH: "flush"}[op]


cdef int filter_ask(target *t, int op, uint64_t offset, uint64_t length) noexcept with gil:
    try:
        return (<FilterTarget>t.object).start(op_name(op), offset - t.start, length)
    except OSError as error:
        return -(error.errno or EIO)
    except BaseException:
        return -EIO


cdef int filter_mangle(
    target *t, int op, uint64_t offset, uint8_t *data, uint64_t length
) noexcept with gil:
    try:
        (<FilterTarget>t.object).mangle(
            op_name(op), offset - t.start, memoryview(<uint8_t[:length]>data))
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
