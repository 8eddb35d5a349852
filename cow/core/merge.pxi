# Merging: exceptions go back into the origin, from the last committed one backwards.
#
# A step takes whole runs (old and new both falling by one) until it has MERGE_STEP bytes:
#   1. siblings get their copies of all that will be overwritten            prepare, commit
#   2. the exceptions are marked: writes to them wait                       map lock exclusive
#   3. store -> origin                                          | barrier on the origin
#   4. the records are zeroed                                   | barrier on the store
#   5. the exceptions are forgotten, the marks with them                    map lock exclusive
# After a crash anywhere the last runs are merged again, which changes nothing.

cdef int merge_fill_window(snapshot *s) noexcept nogil:
    """Make the window hold the last records of the current area."""
    cdef store *st = s.store
    cdef uint64_t first
    cdef int rc
    if s.window == NULL:
        s.window = <record *>malloc(MERGE_WINDOW * sizeof(record))
        if s.window == NULL:
            return -ENOMEM
        s.window_end = 0
    if s.window_area == st.area and s.window_first < st.committed <= s.window_end:
        return 0
    if s.window_area != st.area or s.window_end == 0:
        s.broken_from = st.committed
    first = st.committed - MERGE_WINDOW if st.committed > MERGE_WINDOW else 0
    s.window_end = 0
    rc = read_records(st, s.window, st.area, first, st.committed - first)
    if rc:
        return rc
    s.window_area = st.area
    s.window_first = first
    s.window_end = st.committed
    return 0


cdef uint64_t merge_run_start(snapshot *s, uint64_t end) noexcept nogil:
    """Return the index of the first record of the run that ends before record `end`."""
    cdef record *w = s.window
    cdef uint64_t i = end - s.window_first - 1
    while (i > 0 and w[i - 1].old_chunk + 1 == w[i].old_chunk
           and w[i - 1].new_chunk + 1 == w[i].new_chunk):
        i -= 1
    return i + s.window_first


cdef int merge_step(snapshot *s) noexcept nogil:
    """Merge some: 1 if there is more, 0 if all is merged, BIO_SUSPENDED, or -errno (failed)."""
    cdef store *st = s.store
    cdef int rc
    if not port_load32(&st.valid):
        return 0
    if st.committed == 0:
        if st.area == 0:
            return 0
        port_store64(&st.area, st.area - 1)
        port_store64(&st.committed, st.exceptions_per_area)
    rc = merge_fill_window(s)
    if rc == 0:
        rc = merge_runs(s)
    if rc < 0:
        port_store32(&s.merge_failed, 1)
    port_event_raise(&s.family.merge_steps)
    return 1 if rc == 0 else rc


cdef int merge_runs(snapshot *s) noexcept nogil:
    cdef store *st = s.store
    cdef family *f = s.family
    cdef record *w = s.window
    cdef commit_group group
    cdef uint64_t end = st.committed, first, start, reached, offset, i, most
    cdef uint64_t low = <uint64_t>-1, high = 0
    cdef int rc = 0, committed, failed
    # 1. Which runs, and the siblings' copies, run by run in the order of merging.
    group.count = 0
    most = max(<uint64_t>1, <uint64_t>MERGE_STEP >> st.chunk_shift)
    first = end
    while first > s.window_first and end - first < most:
        start = merge_run_start(s, first)
        if end - start > most and first != end:
            break
        if start < s.broken_from:
            rc = family_prepare(
                f, &group, w[start - s.window_first].old_chunk << st.chunk_shift,
                (min(first, s.broken_from) - start) << st.chunk_shift, first != end)
            if rc < 0 and first != end:
                rc = 0      # the next step begins with this run; if there is none, it is too early
                break
            if rc:
                break
            s.broken_from = start
        first = end - most if end - start > most else start      # a long run goes in pieces
    committed = group_commit(&group)
    if rc or committed:
        return rc if rc else committed
    # 2. Writers on the way are through when the lock is had; later ones see the mark.
    merge_mark(s, first, end, True)
    # 3. and what was copied before an error is merged all the same.
    reached = end
    rc = merge_copy(s, first, &reached, &low, &high)
    if rc:
        merge_mark(s, first, reached, False)
    if reached == end:
        return rc
    failed = barrier(s.origin, low, high - low)
    # 4.
    offset = record_offset(st, st.area, reached)
    if failed == 0:
        failed = write_device(st.cow, NULL, offset, (end - reached) * sizeof(record))
    if failed == 0:
        failed = barrier(st.cow, offset, (end - reached) * sizeof(record))
    if failed:
        merge_mark(s, reached, end, False)
        return failed
    # 5.
    port_write_lock(&f.map)
    for i in range(reached - s.window_first, end - s.window_first):
        exception_set(&st.exceptions, w[i].old_chunk, 0)
    port_write_unlock(&f.map)
    port_store64(&st.committed, reached)
    port_store64(&st.next_free, area_location(st, st.area) + reached + 1)
    return rc


cdef void merge_mark(snapshot *s, uint64_t first, uint64_t end, bint on) noexcept nogil:
    cdef uint64_t i, flag = ENTRY_MERGING if on else 0
    cdef record *r
    port_write_lock(&s.family.map)
    for i in range(first, end):
        r = &s.window[i - s.window_first]
        exception_set(&s.store.exceptions, r.old_chunk, (r.new_chunk + 1) | flag)
    port_write_unlock(&s.family.map)


cdef int merge_copy(
    snapshot *s, uint64_t first, uint64_t *reached, uint64_t *low, uint64_t *high
) noexcept nogil:
    """Copy the runs of records [first, reached) into the origin, the last run first.

    `reached` goes down as they are copied; `low` and `high` get the range of the origin that was
    written, clipped at its end.
    """
    cdef store *st = s.store
    cdef record *r
    cdef uint64_t start, offset, length
    cdef int rc
    while reached[0] > first:
        start = max(first, merge_run_start(s, reached[0]))
        r = &s.window[start - s.window_first]
        offset = r.old_chunk << st.chunk_shift
        length = min((reached[0] - start) << st.chunk_shift, s.origin.size - offset)
        rc = copy_device(st.cow, r.new_chunk << st.chunk_shift, s.origin, offset, length,
                         COPY_STREAM)
        if rc:
            return rc
        low[0] = min(low[0], offset)
        high[0] = max(high[0], offset + length)
        reached[0] = start
    return 0
