# Constants, structs, and what comes from port.h.

cimport cython
from libc.errno cimport (
    EFAULT, EINTR, EINVAL, EIO, ENOMEM, ENOSPC, ENXIO, EOPNOTSUPP, EPERM, errno,
)
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset, memmove

cdef extern from "port.h" nogil:
    int port_install_sigbus()
    int port_copy(void *target, const void *source, size_t size)
    int port_copy_stream(void *target, const void *source, size_t size)
    int port_zero(void *target, size_t size)
    void port_stream_end()
    void port_prefetch(const void *address)
    uint64_t port_load64(const uint64_t *p)
    void port_store64(uint64_t *p, uint64_t v)
    void port_or64(uint64_t *p, uint64_t bits)
    uint64_t port_lowest_bit(uint64_t v)
    uint32_t port_load32(const uint32_t *p)
    void port_store32(uint32_t *p, uint32_t v)

    ctypedef struct port_rwlock:
        pass
    void port_rwlock_init(port_rwlock *l)
    void port_rwlock_destroy(port_rwlock *l)
    void port_read_lock(port_rwlock *l)
    void port_read_unlock(port_rwlock *l)
    void port_use_begins()
    void port_use_ends()
    void port_fuse_request()
    void port_fuse_answer()
    void port_write_lock(port_rwlock *l)
    void port_write_unlock(port_rwlock *l)

    ctypedef struct port_event:
        pass
    void port_event_init(port_event *e)
    uint64_t port_event_count(port_event *e)
    void port_event_raise(port_event *e)
    uint64_t port_event_wait(port_event *e, uint64_t seen, uint64_t microseconds)
    uint64_t port_microseconds()

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attr)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_trylock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

cdef extern from "<sys/mman.h>" nogil:
    void *mremap(void *address, size_t old_size, size_t new_size, int flags, ...)
    enum: MREMAP_MAYMOVE
    void *mmap(void *address, size_t length, int prot, int flags, int fd, int64_t offset)
    int munmap(void *address, size_t length)
    int madvise(void *address, size_t length, int advice)
    int msync(void *address, size_t length, int flags)
    void *MAP_FAILED
    enum: MAP_ANONYMOUS, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED
    enum: MS_SYNC, PROT_READ, PROT_WRITE

cdef extern from "<fcntl.h>" nogil:
    int fallocate(int fd, int mode, int64_t offset, int64_t length)

cdef extern from "<sys/vfs.h>" nogil:
    struct statfs:
        int64_t f_type
    int fstatfs(int fd, statfs *status)

cdef extern from "<unistd.h>" nogil:
    int fdatasync(int fd)
    int ftruncate(int fd, int64_t length)
    int64_t lseek(int fd, int64_t offset, int whence)
    int64_t pread(int fd, void *data, size_t size, int64_t offset)
    int64_t pwrite(int fd, const void *data, size_t size, int64_t offset)

cdef enum:
    MADV_HUGEPAGE = 14
    MADV_POPULATE_WRITE = 23        # Linux 5.14; EINVAL on older kernels
    FALLOC_FL_KEEP_SIZE = 1
    FALLOC_FL_PUNCH_HOLE = 2
    SEEK_DATA = 3
    SEEK_HOLE = 4
    PAGE = 4096
    SECTOR = 512
    TMPFS_MAGIC = 0x01021994

# What a request answers besides 0 and -errno.
cdef enum:
    BIO_SHARED = 1                  # a write reached a chunk that must be prepared first
    BIO_HELD = 2                    # a write reached a chunk that is just being merged
    BIO_SUSPENDED = 3               # a device on the way is suspended
    BIO_FULL = 4                    # preparing: the store of `bio.snapshot` has no room
    BIO_MORE = 5                    # preparing: the group is full; commit it and come again
    BIO_ENOUGH = 6                  # looking: as many extents as were asked for

cdef enum:
    READ
    WRITE                           # in place; BIO_SHARED where that would change a snapshot
    PREPARE                         # make the range writable in place: break sharing
    DISCARD
    FLUSH
    EXTENTS
    RESERVE                         # map the pages of the range beforehand; of plain devices only

# How bytes are copied. Whoever asks for COPY_STREAM ends the stream.
cdef enum:
    COPY_CACHED = 0                 # somebody will look at them soon
    COPY_STREAM = 1                 # past the cache
    COPY_FRESH = 2                  # into a place that may not exist yet, and past the cache
    COPY_CLEAN = 3                  # over data that was just copied away: its pages are clean

# Where the bytes of an extent come from (cow.ORIGIN, cow.COW, cow.ZERO).
cdef enum:
    FROM_NOWHERE = -1               # no snapshot above
    FROM_ORIGIN = 0
    FROM_COW = 1
    FROM_ZERO = 2

# Entries of the exception table: store chunk + 1, and flags; 0 is "no exception".
cdef enum:
    LEAF_SHIFT = 6                  # 64 entries a leaf
    LEAF_MASK = 63
    SMALL_LEAVES = 1 << 22          # bytes of leaves kept in small pages
    LOOKUPS_AHEAD = 24              # so far ahead an entry is fetched, and its place twice as far
cdef extern from *:
    """
    #define ENTRY_PENDING (1ull << 63)   /* reserved and copied, not yet committed: not followed */
    #define ENTRY_MERGING (1ull << 62)   /* being copied back: writes to it wait */
    #define ENTRY_CHUNK   (ENTRY_MERGING - 1)
    """
    const uint64_t ENTRY_PENDING
    const uint64_t ENTRY_MERGING
    const uint64_t ENTRY_CHUNK

cdef enum:
    MAX_GROUP = 8                   # families one commit group holds
    BOUNCE_SIZE = 1 << 18           # copying from a device that needs locks goes by way of this
    RESERVE_FIRST = 1 << 16         # bytes of the store reserved at once: at first, and doubling
    RESERVE_MOST = 1 << 22          # up to this
    MERGE_STEP = 1 << 22            # bytes merged between two barriers
    MERGE_WINDOW = 1 << 16          # records of an area held while merging
    LOAD_WINDOW = 1 << 12           # records read at once when a store is opened
    STREAM_SIZE = 1 << 22           # batches of more bytes are copied past the cache
    BATCH_BYTES = 1 << 21           # bytes of a batch under one taking of the locks
    BATCH_PREPARE = 1 << 14         # requests of write_many prepared and committed together
    PREFETCH_AHEAD = 3
    WAIT_SLICE = 100000             # microseconds after which one who waits looks up

# What a filter answers (FilterTarget.start).
cdef enum:
    FILTER_PASS = 0
    FILTER_DROP = 1                 # say it is done and do nothing
    FILTER_MANGLE = 2               # let mangle() change the data on its way

ctypedef int (*emit_fn)(bio *b, device *image, uint64_t offset, uint64_t length) noexcept nogil
ctypedef int (*map_fn)(target *t, bio *b, uint64_t offset, uint64_t length) noexcept nogil

# The lock around all that can change between two requests, and what those who wait look at.
cdef struct gate:
    port_rwlock lock
    port_event changes              # counted up after every exclusive holder
    port_event events               # of all devices
    bint power                      # durability "power": barriers are flushed

# One pass over one range of a device. Targets cut and redirect it; what arrives at an image, run
# by run and in order of the request, is given to `emit`.
cdef struct bio:
    int op
    int source                      # EXTENTS: FROM_ORIGIN or FROM_COW, by the uppermost snapshot
    int copy                        # COPY_: how bytes get where they go
    bint place                      # PREPARE: new data may go into fresh chunks at once
    uint8_t *data                   # the caller's memory; NULL in a WRITE: zeros
    uint64_t done                   # bytes passed so far
    uint64_t placed                 # PREPARE: bytes of new data that are in fresh chunks already
    emit_fn emit
    void *context                   # for emit
    snapshot *snapshot              # BIO_FULL, BIO_HELD: whose
    uint64_t seen                   # BIO_HELD: merge steps counted when it was met
    commit_group *group             # PREPARE: families with something to commit

# The families a request has prepared chunks in, each with the sequence number to commit.
cdef struct commit_group:
    int count
    bint sound                      # committed, and no snapshot of these families is invalid
    family *families[MAX_GROUP]
    uint64_t sequence[MAX_GROUP]

# A block device: an image, or a mapped device with a live table.
cdef struct device:
    uint64_t size
    gate *gate
    family *family                  # snapshots of this device, once there were any
    # An image. `base` is NULL for a mapped device.
    uint8_t *base
    int fd
    bint writable
    uint32_t sparse                 # has holes, or may grow
    bint on_disk                    # to make a clean page writable takes a file system's journal
    uint64_t file_size              # below `size` while a growing image has not reached it
    pthread_mutex_t grow_mutex
    # A mapped device. Guarded by the gate.
    bint mapped
    bint suspended
    bint removed
    table *live
    bint plain                      # only images, linear, striped and zero below: no map locks
    int nr_locks
    family **locks                  # the families below, in order of their number
    port_event events               # event_nr of the kernel

cdef struct table:
    int nr_targets
    target **targets
    uint64_t *ends                  # ends[i]: first byte after targets[i]

cdef struct stripe:
    device *dev
    uint64_t start

# The kinds of errors a leg of a mirror had; one that failed is not read any more.
cdef enum:
    LEG_READ = 1
    LEG_WRITE = 2
    LEG_FLUSH = 4

cdef struct leg:
    device *dev
    uint64_t start
    uint32_t failed                 # LEG_ bits

cdef struct mirror:
    int nr_legs
    leg *legs
    uint64_t region_size            # bytes
    uint64_t nr_regions
    uint64_t *out_of_sync           # a bit for each region whose legs may differ
    device *owner                   # told when a leg fails; NULL where errors are not handled

cdef struct target:
    map_fn map
    uint64_t start
    uint64_t length
    device *dev
    uint64_t dev_start              # linear
    uint64_t chunk_size             # striped, bytes
    uint64_t nr_stripes
    stripe *stripes
    snapshot *snapshot
    mirror *mirror
    void *object                    # filter: the Python object

cdef struct exception_table:
    uint64_t nr_chunks
    uint32_t nr_leaves              # leaf 0 is shared by all that hold nothing, and stays zero
    uint64_t most                   # exceptions there are leaves for, wherever they are
    uint32_t *directory             # leaf number of each 64 chunks
    uint64_t *leaves
    size_t directory_size
    size_t leaves_size

cdef struct record:                 # as on disk
    uint64_t old_chunk
    uint64_t new_chunk

cdef struct records:
    record *items
    uint64_t count
    uint64_t capacity

# A COW store. Handed over between snapshots as a whole.
cdef struct store:
    device *cow
    bint persistent
    bint overflow_supported         # "PO"
    uint32_t valid                  # written under the prepare mutex
    uint32_t overflowed
    int chunk_shift                 # bytes; 0 while there is no chunk size
    uint64_t exceptions_per_area
    uint64_t area                   # the one records are appended to, and how many it holds
    uint64_t committed
    uint64_t next_free              # guarded by the prepare mutex, as `pending`
    uint64_t reserved               # chunks below have their pages
    uint64_t reserve_step
    uint64_t low_water_mark         # bytes: with less than that free the owner is told, once
    bint tail_dirty                 # something lies behind the last record: zero it first
    bint recorded                   # `committing` is on disk; guarded by the commit mutex
    records pending                 # prepared, in order of allocation
    records committing              # taken by the committing thread; guarded by the commit mutex
    exception_table exceptions

cdef struct snapshot:
    family *family
    device *origin
    device *owner                   # the mapped device told of events; NULL while not live
    store *store
    uint64_t end                    # of the device: origin writes behind it do not concern us
    bint active                     # gets origin writes: from the first resume on
    bint merging                    # a snapshot-merge
    uint32_t merge_failed
    bint discard_zeroes_cow
    bint discard_passdown_origin
    # Merging: the records of the area being merged, from `window_first` on.
    record *window
    uint64_t window_area
    uint64_t window_first
    uint64_t window_end
    uint64_t broken_from            # siblings have their copies for records from here on

cdef struct settled_map:
    uint64_t *words                 # NULL: nothing is settled
    uint64_t size                   # bytes
    uint64_t nr_granules
    int granule_shift               # bytes

# An origin with its snapshots: the unit of locking and of copy-before-write.
cdef struct family:
    uint64_t number
    device *origin
    port_rwlock map
    pthread_mutex_t prepare
    pthread_mutex_t commit
    port_event merge_steps
    int nr_snapshots                # active ones, largest chunk first; guarded by the gate
    snapshot **snapshots
    settled_map settled
    uint64_t prepared               # sequence numbers; `prepared` written under the prepare mutex,
    uint64_t committing             # the others, and what follows, guarded by the commit mutex
    uint64_t committed
    port_event commits              # counted up after each
    port_event arrivals             # counted up for each thread that needs one, with "power"
    uint64_t served                 # arrivals when the last commit began
    uint64_t last_group             # threads it was for, and those who queued behind it
    uint64_t last_end               # microseconds, when it ended and how long it took
    uint64_t last_microseconds
    bint in_commit                  # a commit was interrupted by a suspended device
