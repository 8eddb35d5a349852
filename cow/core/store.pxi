# The COW store: the kernel's persistent layout, and the transient one that only counts.
#
# Persistent, in chunks: 0 is the header, 1 + (E + 1) * a is metadata area a, all others hold data;
# E = exceptions_per_area = chunk bytes / 16. Records fill an area from the front, and one with
# new_chunk 0 ends the list. docs/architecture.md has the argument why the order below survives a
# crash at any point: reserve, copy | record | publish, where | is a barrier.

cdef void store_free(store *st) noexcept nogil:
    exception_table_free(&st.exceptions)
    free(st.pending.items)
    free(st.committing.items)
    memset(&st.pending, 0, sizeof(records))
    memset(&st.committing, 0, sizeof(records))


cdef inline uint64_t chunk_bytes(store *st) noexcept nogil:
    return <uint64_t>1 << st.chunk_shift


cdef inline uint64_t area_location(store *st, uint64_t area) noexcept nogil:
    """Return the chunk that holds metadata area `area`."""
    return 1 + (st.exceptions_per_area + 1) * area


cdef inline uint64_t record_offset(store *st, uint64_t area, uint64_t index) noexcept nogil:
    """Return the byte of the store where record `index` of an area starts."""
    return (area_location(st, area) << st.chunk_shift) + index * sizeof(record)


cdef inline bint is_metadata_chunk(store *st, uint64_t chunk) noexcept nogil:
    return chunk % (st.exceptions_per_area + 1) == 1


cdef int store_configure(store *st, int chunk_shift, uint64_t nr_origin_chunks) noexcept nogil:
    st.chunk_shift = chunk_shift
    st.exceptions_per_area = chunk_bytes(st) / sizeof(record)
    st.next_free = 2 if st.persistent else 0
    st.reserve_step = RESERVE_FIRST
    return exception_table_init(&st.exceptions, nr_origin_chunks)


cdef int store_write_header(store *st, uint32_t valid) noexcept nogil:
    """Write chunk 0: magic, valid, version 1, chunk size in sectors; the rest is zeros.

    The header comes last in a new store, and first where it says invalid, come what may.
    """
    cdef uint32_t header[4]
    cdef int rc = 0
    header[0] = 0x70416e53
    header[1] = valid
    header[2] = 1
    header[3] = <uint32_t>(chunk_bytes(st) / SECTOR)
    if valid:
        rc = write_device(st.cow, NULL, sizeof(header), chunk_bytes(st) - sizeof(header))
    if rc == 0:
        rc = write_device(st.cow, <uint8_t *>header, 0, sizeof(header))
    if rc == 0:
        rc = barrier(st.cow, 0, chunk_bytes(st))
    if rc == 0 and not valid:
        write_device(st.cow, NULL, sizeof(header), chunk_bytes(st) - sizeof(header))
    return rc


cdef int store_format(store *st) noexcept nogil:
    """Make a fresh store: area 0 before the header, so that no crash leaves old records valid."""
    cdef int rc = write_device(st.cow, NULL, chunk_bytes(st), chunk_bytes(st))
    if rc == 0:
        rc = barrier(st.cow, chunk_bytes(st), chunk_bytes(st))
    return rc if rc else store_write_header(st, 1)


cdef int read_records(
    store *st, record *window, uint64_t area, uint64_t first, uint64_t n
) noexcept nogil:
    """Read records of an area from the device, page tables spared."""
    cdef bio b
    bio_init(&b, READ, emit_pread, <uint8_t *>window)
    return request(st.cow, &b, record_offset(st, area, first), n * sizeof(record))


cdef struct load_fault:
    int kind                        # one of FAULT_
    uint64_t area
    uint64_t index
    record found

cdef enum:
    FAULT_NONE
    FAULT_OLD_RANGE
    FAULT_NEW_RANGE
    FAULT_METADATA
    FAULT_OLD_TWICE
    FAULT_NEW_TWICE


cdef inline uint64_t store_chunks(store *st) noexcept nogil:
    """Count the chunks of a store that are of use."""
    return min(st.cow.size >> st.chunk_shift, st.exceptions.most)


cdef int store_load(store *st, load_fault *fault) noexcept nogil:
    """Read all areas up to the first record that ends the list.

    Answers -EINVAL with `fault` filled for a record that cannot be right, and changes nothing.
    """
    cdef uint64_t nr_chunks = store_chunks(st)
    cdef uint64_t area = 0, index = 0, first, n, i, highest = 1
    cdef uint64_t per_area = st.exceptions_per_area
    cdef uint8_t *taken = NULL       # a bit for each store chunk
    cdef uint64_t taken_size = nr_chunks / 8 + 1
    cdef record *window = NULL
    cdef bint ended = False
    cdef int rc = 0
    cdef void *p = mmap(NULL, taken_size, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if p == MAP_FAILED:
        return -ENOMEM
    taken = <uint8_t *>p
    window = <record *>malloc(LOAD_WINDOW * sizeof(record))
    if window == NULL:
        rc = -ENOMEM
    while rc == 0 and not ended:
        first = 0
        while first < per_area and rc == 0 and not ended:
            n = min(per_area - first, <uint64_t>LOAD_WINDOW)
            rc = read_records(st, window, area, first, n)
            if rc:
                break
            for i in range(n):
                if i + LOOKUPS_AHEAD < n:
                    exception_prefetch(&st.exceptions, window[i + LOOKUPS_AHEAD].old_chunk)
                if window[i].new_chunk == 0:
                    ended = True
                    index = first + i
                    break
                rc = store_load_record(st, &window[i], taken, nr_chunks, fault)
                if rc:
                    fault.area = area
                    fault.index = first + i
                    fault.found = window[i]
                    break
                highest = max(highest, window[i].new_chunk)
            first += n
        if rc == 0 and not ended:
            area += 1
    if rc == 0:
        rc = store_check_tail(st, window, area, index)
    free(window)
    munmap(taken, taken_size)
    if rc:
        return rc
    st.area = area
    st.committed = index
    st.next_free = highest + 1
    if is_metadata_chunk(st, st.next_free):
        st.next_free += 1
    return 0


cdef inline int store_load_record(
    store *st, record *r, uint8_t *taken, uint64_t nr_chunks, load_fault *fault
) noexcept nogil:
    cdef uint8_t bit = <uint8_t>(1 << (r.new_chunk & 7))
    if r.old_chunk >= st.exceptions.nr_chunks:
        fault.kind = FAULT_OLD_RANGE
    elif r.new_chunk >= nr_chunks:
        fault.kind = FAULT_NEW_RANGE
    elif is_metadata_chunk(st, r.new_chunk):
        fault.kind = FAULT_METADATA
    elif exception_find(&st.exceptions, r.old_chunk):
        fault.kind = FAULT_OLD_TWICE
    elif taken[r.new_chunk >> 3] & bit:
        fault.kind = FAULT_NEW_TWICE
    else:
        taken[r.new_chunk >> 3] |= bit
        exception_set(&st.exceptions, r.old_chunk, r.new_chunk + 1)
        return 0
    return -EINVAL


cdef int store_check_tail(store *st, record *window, uint64_t area, uint64_t index) noexcept nogil:
    """See whether anything stands behind the last record: a torn write can leave such a thing.

    It is zeroed before the next record, which would otherwise bring it back to life.
    """
    cdef uint64_t n, i
    cdef int rc
    st.tail_dirty = False
    while index < st.exceptions_per_area:
        n = min(st.exceptions_per_area - index, <uint64_t>LOAD_WINDOW)
        rc = read_records(st, window, area, index, n)
        if rc:
            return rc
        for i in range(n):
            if window[i].old_chunk or window[i].new_chunk:
                st.tail_dirty = True
                return 0
        index += n
    return 0


cdef int store_prepare_exception(store *st, uint64_t *first, uint64_t *count) noexcept nogil:
    """Find up to `count` neighbouring free chunks. They are taken by store_take().

    -ENOSPC: the kernel's rule, COW sectors < (next_free + 1) * chunk.
    """
    cdef uint64_t nr_chunks = store_chunks(st)
    cdef uint64_t room, place
    if st.next_free >= nr_chunks:
        return -ENOSPC
    room = nr_chunks - st.next_free
    if st.persistent:
        place = st.next_free % (st.exceptions_per_area + 1)      # 1 is the metadata chunk
        room = min(room, st.exceptions_per_area + 2 - place if place else <uint64_t>1)
    first[0] = st.next_free
    count[0] = min(count[0], room)
    return store_reserve(st, first[0] + count[0])


cdef int store_reserve(store *st, uint64_t end) noexcept nogil:
    """Have pages for the chunks below `end` before they are copied into, and for some more."""
    cdef uint64_t nr_chunks = st.cow.size >> st.chunk_shift, ahead
    cdef bio b
    cdef int rc
    if end <= st.reserved or not st.cow.plain:
        return 0
    st.reserved = max(st.reserved, st.next_free)
    ahead = min(nr_chunks, max(end, st.reserved + (st.reserve_step >> st.chunk_shift)))
    bio_init(&b, RESERVE, emit_reserve, NULL)
    rc = device_map(st.cow, &b, st.reserved << st.chunk_shift,
                    (ahead - st.reserved) << st.chunk_shift)
    if rc == BIO_SUSPENDED:
        return rc
    st.reserved = ahead
    st.reserve_step = min(2 * st.reserve_step, <uint64_t>RESERVE_MOST)
    return 0                        # errors show in the copying


cdef int store_take(store *st, uint64_t old_chunk, uint64_t first, uint64_t count) noexcept nogil:
    """Reserve copied chunks under their exceptions: pending, to be committed in this order."""
    cdef uint64_t i
    cdef int rc = records_append(&st.pending, old_chunk, first, count)
    if rc:
        return rc
    for i in range(count):
        exception_set(&st.exceptions, old_chunk + i, (first + i + 1) | ENTRY_PENDING)
    first += count
    if st.persistent and is_metadata_chunk(st, first):
        first += 1
    port_store64(&st.next_free, first)
    return 0


cdef inline uint64_t store_free_bytes(store *st) noexcept nogil:
    """Return how much of the COW device no chunk was taken of."""
    cdef uint64_t taken = port_load64(&st.next_free) << st.chunk_shift
    return st.cow.size - taken if taken < st.cow.size else 0


cdef int store_commit(store *st) noexcept nogil:
    """Write the records of `committing`, whose data is in place; first what they need.

    Counters change only at the end, so that an interrupted commit is done again from the start.
    """
    cdef uint64_t n = st.committing.count, per_area = st.exceptions_per_area
    cdef uint64_t area = st.area, index = st.committed, filled, i, k, low, high
    cdef int rc
    if n == 0 or not st.persistent:
        return 0
    filled = (index + n) / per_area
    if st.tail_dirty:
        low = record_offset(st, area, index)
        high = (per_area - index) * sizeof(record)
        rc = write_device(st.cow, NULL, low, high)
        if rc == 0:
            rc = barrier(st.cow, low, high)
        if rc:
            return rc
        st.tail_dirty = False
    # The area after one that becomes full is empty before that one's last record is written.
    for i in range(1, filled + 1):
        rc = write_device(st.cow, NULL, record_offset(st, area + i, 0), chunk_bytes(st))
        if rc:
            return rc
    low = st.committing.items[0].new_chunk
    high = st.committing.items[n - 1].new_chunk + 1
    if filled:
        low = min(low, area_location(st, area + 1))
        high = max(high, area_location(st, area + filled) + 1)
    rc = barrier(st.cow, low << st.chunk_shift, (high - low) << st.chunk_shift)
    if rc:
        return rc
    # One barrier for the records of all areas: should those of a later area reach the disk alone,
    # they lie behind the end of the list, and are zeroed before the list gets there.
    low = record_offset(st, area, index)
    i = 0
    while i < n:
        k = min(per_area - index, n - i)
        high = record_offset(st, area, index) + k * sizeof(record)
        rc = write_device(st.cow, <uint8_t *>&st.committing.items[i], high - k * sizeof(record),
                          k * sizeof(record))
        if rc:
            return rc
        i += k
        index += k
        if index == per_area:
            index = 0
            area += 1
    rc = barrier(st.cow, low, high - low)
    if rc:
        return rc
    port_store64(&st.area, area)
    port_store64(&st.committed, index)
    return 0


cdef void store_publish(store *st) noexcept nogil:
    """Make committed exceptions visible. The map lock is held exclusive."""
    cdef uint64_t i
    cdef record *r
    if not port_load32(&st.valid):
        return
    for i in range(st.committing.count):
        r = &st.committing.items[i]
        exception_set(&st.exceptions, r.old_chunk, r.new_chunk + 1)
