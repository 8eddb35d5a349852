# The exception table: origin chunk -> store chunk, a sparse array of two levels.
#
# A directory holds the leaf of each 64 neighbouring chunks; leaves are handed out in order of need.
# Both are reserved for the whole origin at once, and untouched pages cost nothing: no growing, no
# rehashing, no ENOMEM in the middle of a write, and readers never see the table move. Entries are
# written with the prepare mutex held (pending) or the map lock exclusive, and read by holders of
# either lock.
#
# There are 2^32 leaves at most: origins of more than 1 PiB, with chunks of 4 KiB, have fewer leaves
# than neighbourhoods. There a store has no more chunks of use than there are leaves.

cdef uint64_t MAX_LEAVES = 0xFFFFFFFF


cdef uint64_t exception_leaves(uint64_t nr_chunks) noexcept nogil:
    """Count the leaves that an origin of so many chunks may need, the empty one among them."""
    return min((nr_chunks >> LEAF_SHIFT) + 2, MAX_LEAVES)


cdef void exception_table_sizes(exception_table *e, uint64_t nr_chunks) noexcept nogil:
    cdef uint64_t nr_leaves = exception_leaves(nr_chunks)
    e.nr_chunks = nr_chunks
    e.directory_size = ((nr_chunks >> LEAF_SHIFT) + 1) * sizeof(uint32_t)
    e.leaves_size = (nr_leaves << LEAF_SHIFT) * sizeof(uint64_t)
    e.most = ~<uint64_t>0 if nr_leaves < MAX_LEAVES else MAX_LEAVES - 1


cdef int exception_table_map_leaves(exception_table *e) noexcept nogil:
    cdef void *p = mmap(NULL, e.leaves_size, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if p == MAP_FAILED:
        return -ENOMEM
    e.leaves = <uint64_t *>p
    if e.leaves_size > SMALL_LEAVES:
        # Leaves fill up from the front, so large pages waste nothing once there are many.
        madvise(<char *>p + SMALL_LEAVES, e.leaves_size - SMALL_LEAVES, MADV_HUGEPAGE)
    return 0


cdef int exception_table_init(exception_table *e, uint64_t nr_chunks) noexcept nogil:
    cdef void *p
    memset(e, 0, sizeof(exception_table))
    exception_table_sizes(e, nr_chunks)
    e.nr_leaves = 1
    p = mmap(NULL, e.directory_size, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if p == MAP_FAILED:
        return -ENOMEM
    e.directory = <uint32_t *>p
    if exception_table_map_leaves(e):
        munmap(e.directory, e.directory_size)
        e.directory = NULL
        return -ENOMEM
    return 0


cdef int exception_table_extend(exception_table *e, uint64_t nr_chunks) noexcept nogil:
    """Make room for a longer origin. Nobody else looks: the gate is held exclusively."""
    cdef exception_table longer = e[0]
    cdef void *p
    if nr_chunks <= e.nr_chunks:
        return 0
    exception_table_sizes(&longer, nr_chunks)
    if exception_table_map_leaves(&longer):
        return -ENOMEM
    p = mremap(e.directory, e.directory_size, longer.directory_size, MREMAP_MAYMOVE)
    if p == MAP_FAILED:
        munmap(longer.leaves, longer.leaves_size)
        return -ENOMEM
    longer.directory = <uint32_t *>p
    memcpy(longer.leaves, e.leaves, (<size_t>e.nr_leaves << LEAF_SHIFT) * sizeof(uint64_t))
    munmap(e.leaves, e.leaves_size)
    e[0] = longer
    return 0


cdef void exception_table_free(exception_table *e) noexcept nogil:
    if e.directory != NULL:
        munmap(e.directory, e.directory_size)
        munmap(e.leaves, e.leaves_size)
    memset(e, 0, sizeof(exception_table))


cdef inline uint64_t *exception_slot(exception_table *e, uint64_t chunk) noexcept nogil:
    cdef uint64_t leaf = port_load32(&e.directory[chunk >> LEAF_SHIFT])
    return &e.leaves[(leaf << LEAF_SHIFT) + (chunk & LEAF_MASK)]


cdef inline uint64_t exception_find(exception_table *e, uint64_t chunk) noexcept nogil:
    """Return the entry of `chunk`, flags included; 0 is none."""
    if chunk >= e.nr_chunks:
        return 0
    return port_load64(exception_slot(e, chunk))


cdef inline void exception_prefetch_leaf(exception_table *e, uint64_t chunk) noexcept nogil:
    """Fetch where the leaf of `chunk` is: what exception_prefetch needs."""
    if chunk < e.nr_chunks:
        port_prefetch(&e.directory[chunk >> LEAF_SHIFT])


cdef inline void exception_prefetch(exception_table *e, uint64_t chunk) noexcept nogil:
    """Fetch the entry of `chunk`."""
    if chunk < e.nr_chunks:
        port_prefetch(exception_slot(e, chunk))


cdef inline bint entry_complete(uint64_t entry) noexcept nogil:
    return entry != 0 and not entry & ENTRY_PENDING


cdef inline uint64_t entry_chunk(uint64_t entry) noexcept nogil:
    return (entry & ENTRY_CHUNK) - 1


cdef void exception_set(exception_table *e, uint64_t chunk, uint64_t entry) noexcept nogil:
    """Write the entry of `chunk`, which is below nr_chunks."""
    cdef uint32_t *leaf = &e.directory[chunk >> LEAF_SHIFT]
    if leaf[0] == 0:
        port_store32(leaf, e.nr_leaves)
        e.nr_leaves += 1
    port_store64(exception_slot(e, chunk), entry)


cdef inline uint64_t exception_run(
    exception_table *e, uint64_t chunk, uint64_t most, uint64_t *first
) noexcept nogil:
    """Count the chunks from `chunk` on, at most `most`, that lie in one piece on one side.

    `first` gets the store chunk + 1 of the first, or 0 where the run is in the origin.
    """
    cdef uint64_t entry = exception_find(e, chunk), n = 1
    if not entry_complete(entry):
        first[0] = 0
        while n < most and not entry_complete(exception_find(e, chunk + n)):
            n += 1
        return n
    first[0] = entry & ENTRY_CHUNK
    while n < most:
        entry = exception_find(e, chunk + n)
        if not entry_complete(entry) or (entry & ENTRY_CHUNK) != first[0] + n:
            break
        n += 1
    return n


cdef inline uint64_t exception_private(
    exception_table *e, uint64_t chunk, uint64_t most
) noexcept nogil:
    """Count the chunks from `chunk` on, at most `most`, that have a complete exception."""
    cdef uint64_t n = 0
    while n < most and entry_complete(exception_find(e, chunk + n)):
        n += 1
    return n


cdef int records_append(
    records *r, uint64_t old_chunk, uint64_t new_chunk, uint64_t n
) noexcept nogil:
    """Append n records of neighbouring chunks."""
    cdef uint64_t capacity = r.capacity, i
    cdef void *items
    if r.count + n > capacity:
        capacity = max(2 * capacity, r.count + n, <uint64_t>64)
        items = realloc(r.items, capacity * sizeof(record))
        if items == NULL:
            return -ENOMEM
        r.items = <record *>items
        r.capacity = capacity
    for i in range(n):
        r.items[r.count + i].old_chunk = old_chunk + i
        r.items[r.count + i].new_chunk = new_chunk + i
    r.count += n
    return 0
