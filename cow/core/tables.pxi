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
cdef class Mirror(TargetMap):
    """The same bytes on several (device, start sector) legs, kept track of in regions of sectors.

    `events`: the device has an event whenever a leg fails in a new way.
    """

    FAILED_READ = LEG_READ
    FAILED_WRITE = LEG_WRITE
    FAILED_FLUSH = LEG_FLUSH

    cdef mirror m
    cdef BlockDevice owner
    cdef bint events

    def __init__(self, start, length, uint64_t region_size, legs, *, bint events):
        cdef BlockDevice dev
        cdef uint64_t dev_start
        cdef int i
        self.devices = tuple([each[0] for each in legs])
        self.events = events
        self.t.map = mirror_map
        self.t.mirror = &self.m
        self.m.region_size = region_size * SECTOR
        self.m.nr_regions = (self.t.length + self.m.region_size - 1) // self.m.region_size
        self.m.out_of_sync = <uint64_t *>calloc(self.m.nr_regions // 64 + 1, sizeof(uint64_t))
        self.m.legs = <leg *>calloc(<size_t>len(legs), sizeof(leg))
        if self.m.legs == NULL or self.m.out_of_sync == NULL:
            raise MemoryError
        self.m.nr_legs = <int>len(legs)
        for i in range(self.m.nr_legs):
            dev, dev_start = legs[i]
            self.m.legs[i].dev = &dev.d
            self.m.legs[i].start = dev_start * SECTOR

    def __dealloc__(self):
        free(self.m.legs)
        free(self.m.out_of_sync)

    def activate(self, BlockDevice owner not None):
        """Name the device that has the events, and trust every leg again. Gate held exclusively."""
        cdef int i
        self.owner = owner
        self.m.owner = &owner.d if self.events else NULL
        for i in range(self.m.nr_legs):
            self.m.legs[i].failed = 0

    @property
    def failed(self):
        """The FAILED_ bits of each leg."""
        return [port_load32(&self.m.legs[i].failed) for i in range(self.m.nr_legs)]

    @property
    def in_sync(self):
        """A byte for each region: 1 where all legs hold the same, as far as is known."""
        cdef bytearray result = bytearray(self.m.nr_regions)
        cdef uint64_t i
        for i in range(self.m.nr_regions):
            result[i] = 1 - (port_load64(&self.m.out_of_sync[i // 64]) >> (i % 64) & 1)
        return result

    @in_sync.setter
    def in_sync(self, const uint8_t[::1] regions):
        cdef uint64_t i
        for i in range(min(self.m.nr_regions, <uint64_t>regions.shape[0])):
            if regions[i]:
                self.m.out_of_sync[i // 64] &= ~(<uint64_t>1 << (i % 64))
            else:
                self.m.out_of_sync[i // 64] |= <uint64_t>1 << (i % 64)


@cython.final
cdef class Zero(TargetMap):
    """Reads zeros, forgets writes."""

    def __init__(self, start, length):
        self.t.map = zero_map


@cython.final
cdef class Error(TargetMap):
    """Fails everything but a flush with EIO."""

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
