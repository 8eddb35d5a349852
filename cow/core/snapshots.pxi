# The Python-visible COW store and snapshot.

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

    def __cinit__(
        self, BlockDevice cow not None, *, bint persistent, bint overflow_supported=False
    ):
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

    def pread(self, Py_ssize_t size, uint64_t offset):
        """Read from the COW device; where that is suspended it fails and does not wait."""
        cdef bytes result = PyBytes_FromStringAndSize(NULL, size)
        cdef uint8_t *data = <uint8_t *>PyBytes_AS_STRING(result)
        cdef int rc
        with nogil:
            port_read_lock(&self.st.cow.gate.lock)
            rc = read_device(self.st.cow, data, offset, <uint64_t>size)
            port_read_unlock(&self.st.cow.gate.lock)
        self.check(rc, "cannot read the header")
        return result

    def __str__(self):
        return str(self.cow)

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
        port_store32(&self.st.valid, 1 if valid else 0)

    @property
    def overflowed(self):
        """Whether a write found no room ("PO"): reads go on, writes fail."""
        return bool(port_load32(&self.st.overflowed))

    @property
    def low_water_mark(self):
        """Sectors: with less than that free the snapshot's device has an event, once; then 0."""
        return port_load64(&self.st.low_water_mark) // SECTOR

    @low_water_mark.setter
    def low_water_mark(self, uint64_t sectors):
        port_store64(&self.st.low_water_mark, sectors * SECTOR)

    @property
    def usage(self):
        """(allocated, total, metadata) in sectors, as the status line prints them."""
        cdef uint64_t chunk = chunk_bytes(&self.st) // SECTOR if self.st.chunk_shift else 0
        # In this order: a merge counts both down, and must not look done before it is.
        cdef uint64_t allocated = port_load64(&self.st.next_free) * chunk
        cdef uint64_t metadata = (port_load64(&self.st.area) + 2) * chunk
        return allocated, self.st.cow.size // SECTOR, metadata if self.st.persistent else 0


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

        `owner` is the device told when the snapshot becomes invalid; origin writes up to its end
        count, be that behind the end of this target, as in the kernel. Gate held exclusively.
        """
        cdef family *f = &self.family.f
        cdef snapshot **snapshots
        cdef int i
        self.deactivate()
        snapshots = <snapshot **>realloc(
            f.snapshots, <size_t>(f.nr_snapshots + 1) * sizeof(void *))
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
        self.s.end = min(
            owner.d.size, self.store.st.exceptions.nr_chunks << self.store.st.chunk_shift)
        family_unsettle(f)

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

    def make_room(self, Snapshot source not None):
        """Have room in the store of `source` for this origin, as a handover will need.

        MemoryError changes nothing. The gate is held exclusively.
        """
        cdef store *st = source.s.store
        cdef uint64_t end = max(self.t.start + self.t.length, self.s.origin.size)
        if st.chunk_shift and exception_table_extend(
                &st.exceptions, (end + chunk_bytes(st) - 1) >> st.chunk_shift):
            raise MemoryError("Unable to allocate hash table space")

    def hand_over(self, Snapshot source not None):
        """Take over the store of `source`, which is left with this one's, invalid.

        There is room for it: see make_room(). Both stores have the letter P or PO of the new table
        then, as in the kernel. The gate is held exclusively.
        """
        cdef ExceptionStore mine = self.store, theirs = source.store
        theirs.st.overflow_supported = mine.st.overflow_supported
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
                port_event_wait(&self.s.origin.gate.changes, seen, WAIT_SLICE)
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
        cdef exception_table *e = &self.s.store.exceptions
        cdef uint64_t entry
        cdef Py_ssize_t i
        with nogil:
            port_read_lock(&self.s.origin.gate.lock)
            port_read_lock(&self.s.family.map)
            for i in range(old.shape[0]):
                if i + 2 * LOOKUPS_AHEAD < old.shape[0]:
                    exception_prefetch_leaf(e, old[i + 2 * LOOKUPS_AHEAD])
                if i + LOOKUPS_AHEAD < old.shape[0]:
                    exception_prefetch(e, old[i + LOOKUPS_AHEAD])
                entry = exception_find(e, old[i])
                new[i] = entry_chunk(entry) if entry_complete(entry) else <uint64_t>-1
            port_read_unlock(&self.s.family.map)
            port_read_unlock(&self.s.origin.gate.lock)
        return result
