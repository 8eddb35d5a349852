# A family: an origin with its snapshots. Here sharing is broken, in two steps.
#
# Prepare, under the prepare mutex: reserve store chunks, copy into them, mark the exceptions
# pending. Readers go on; nobody changes an origin chunk that is pending, because that takes a
# prepare first.
# Commit, under the commit mutex: whoever comes first writes the records of all that is prepared,
# for all who wait behind as well, and publishes them under the exclusive map lock. That is had only
# when every reader that went to the origin is through; then the origin may change.

cdef int group_add(commit_group *g, family *f) noexcept nogil:
    """Note that `f`, whose prepare mutex is held, has something the request must see committed."""
    cdef int i
    for i in range(g.count):
        if g.families[i] == f:
            g.sequence[i] = f.prepared
            return 0
    if g.count == MAX_GROUP:
        return BIO_MORE
    g.families[g.count] = f
    g.sequence[g.count] = f.prepared
    g.count += 1
    return 0


cdef int group_commit(commit_group *g) noexcept nogil:
    cdef family *f
    cdef int i, j, rc
    g.sound = True
    for i in range(g.count):
        f = g.families[i]
        rc = family_commit(f, g.sequence[i])
        if rc:
            return rc
        for j in range(f.nr_snapshots):
            g.sound = g.sound and port_load32(&f.snapshots[j].store.valid)
    g.count = 0
    return 0


cdef int family_commit(family *f, uint64_t sequence) noexcept nogil:
    """Return when everything prepared up to `sequence` is committed, or with BIO_SUSPENDED.

    One thread at a time commits, for all; the others sleep until it is through and then look
    whether it did theirs. (Sleeping on the mutex they would be overtaken by whoever just held it.)
    """
    cdef uint64_t seen
    cdef int rc
    if f.origin.gate.power and port_load64(&f.committed) < sequence:
        port_event_raise(&f.arrivals)
    while port_load64(&f.committed) < sequence:
        seen = port_event_count(&f.commits)
        if pthread_mutex_trylock(&f.commit):
            if port_load64(&f.committed) < sequence:
                port_event_wait(&f.commits, seen, WAIT_SLICE)
            continue
        rc = 0
        if f.committed < sequence:
            if f.origin.gate.power and not f.in_commit:
                family_gather(f)
            rc = family_commit_all(f)
        pthread_mutex_unlock(&f.commit)
        port_event_raise(&f.commits)
        if rc:
            return rc
    return 0


cdef int family_commit_all(family *f) noexcept nogil:
    """Record and publish what is prepared. The commit mutex is held."""
    cdef snapshot *s
    cdef store *st
    cdef uint64_t start = port_microseconds(), served = f.served
    cdef int i, rc = 0
    f.served = port_event_count(&f.arrivals)
    if not f.in_commit:
        pthread_mutex_lock(&f.prepare)
        for i in range(f.nr_snapshots):
            st = f.snapshots[i].store
            st.pending, st.committing = st.committing, st.pending
            st.recorded = False
        f.committing = f.prepared
        f.in_commit = True
        pthread_mutex_unlock(&f.prepare)
    for i in range(f.nr_snapshots):
        s = f.snapshots[i]
        if s.store.recorded or not port_load32(&s.store.valid):
            continue
        rc = store_commit(s.store)
        s.store.recorded = rc == 0
        if rc < 0:
            pthread_mutex_lock(&f.prepare)
            rc = snapshot_invalidate(s)
            pthread_mutex_unlock(&f.prepare)
        if rc:
            return rc
    port_write_lock(&f.map)
    for i in range(f.nr_snapshots):
        store_publish(f.snapshots[i].store)
    port_write_unlock(&f.map)
    for i in range(f.nr_snapshots):
        f.snapshots[i].store.committing.count = 0
    f.last_end = port_microseconds()
    f.last_microseconds = f.last_end - start
    f.last_group = port_event_count(&f.arrivals) - served
    f.in_commit = False
    port_store64(&f.committed, f.committing)
    return 0


cdef void family_gather(family *f) noexcept nogil:
    """Wait a moment for those of the last commit to come back, so that one commit serves all.

    Without this, writers split into groups that wait for each other in turn. The wait ends when as
    many have come as were there, the last commit's and those who queued behind it; it costs a
    quarter of a commit at most, and nothing where the last one was long ago. The commit mutex is
    held.
    """
    cdef uint64_t now = port_microseconds(), end = now + f.last_microseconds / 4, seen
    if now > f.last_end + f.last_microseconds:
        return
    while now < end:
        seen = port_event_count(&f.arrivals)
        if seen - f.served >= f.last_group:
            break
        port_event_wait(&f.arrivals, seen, end - now)
        now = port_microseconds()


cdef uint64_t family_private(family *f, uint64_t offset, uint64_t length) noexcept nogil:
    """Count the bytes of an origin range, from its start, that no snapshot shares any more."""
    cdef snapshot *s
    cdef store *st
    cdef uint64_t chunk, last, n, end
    cdef int i
    if f.nr_snapshots == 0 or settled_run(&f.settled, offset, length) == length:
        return length
    for i in range(f.nr_snapshots):
        s = f.snapshots[i]
        st = s.store
        if s.merging or not port_load32(&st.valid) or offset >= s.end:
            continue
        end = min(offset + length, s.end)
        chunk = offset >> st.chunk_shift
        last = (end - 1) >> st.chunk_shift
        n = exception_private(&st.exceptions, chunk, last - chunk + 1)
        if n == last - chunk + 1:
            continue
        if n == 0:
            return 0
        length = ((chunk + n) << st.chunk_shift) - offset
    settled_set(&f.settled, offset, length)
    return length


cdef void family_unsettle(family *f) noexcept nogil:
    """Start a new settled map, for the snapshots there are. The gate is held exclusively."""
    cdef snapshot *s
    cdef int i, shift = 0
    for i in range(f.nr_snapshots):
        s = f.snapshots[i]
        if not s.merging and s.store.chunk_shift and (
                shift == 0 or s.store.chunk_shift < shift):
            shift = s.store.chunk_shift
    settled_reset(&f.settled, shift, f.origin.size)


cdef int family_prepare(
    family *f, commit_group *g, uint64_t offset, uint64_t length, bint early=False
) noexcept nogil:
    """Copy an origin range out for every snapshot that still shares it.

    Whatever fails here costs the snapshot, never the origin write; if it is early for the range,
    it costs nothing, and the answer is -errno.
    """
    cdef snapshot *s
    cdef uint64_t end
    cdef bint waits = False
    cdef int i, added, rc = 0
    pthread_mutex_lock(&f.prepare)
    for i in range(f.nr_snapshots):
        s = f.snapshots[i]
        if s.merging or not s.store.valid or offset >= s.end or length == 0:
            continue
        end = min(offset + length, s.end)
        rc = snapshot_copy_out(s, offset >> s.store.chunk_shift,
                               (end - 1) >> s.store.chunk_shift, &waits)
        if rc < 0 and not early:
            rc = snapshot_invalidate(s)
        if rc:
            break
    if waits:
        port_store64(&f.prepared, f.prepared + 1)
        added = group_add(g, f)
        rc = rc if rc else added
    pthread_mutex_unlock(&f.prepare)
    return rc


cdef int snapshot_copy_out(snapshot *s, uint64_t chunk, uint64_t last, bint *waits) noexcept nogil:
    """Copy out the chunks up to `last` that have no exception; runs of them in one piece.

    `waits` is set if anything on the way is pending, our own copies included.
    """
    cdef store *st = s.store
    cdef uint64_t entry, new_chunk, n, offset
    cdef int rc
    while chunk <= last:
        entry = exception_find(&st.exceptions, chunk)
        if entry:
            if entry & ENTRY_PENDING:
                waits[0] = True
            chunk += 1
            continue
        n = 1
        while chunk + n <= last and exception_find(&st.exceptions, chunk + n) == 0:
            n += 1
        rc = store_prepare_exception(st, &new_chunk, &n)
        if rc:
            return rc
        offset = chunk << st.chunk_shift
        if offset >= s.origin.size:
            return 0
        rc = copy_device(s.origin, offset, st.cow, new_chunk << st.chunk_shift,
                         min(n << st.chunk_shift, s.origin.size - offset), COPY_FRESH)
        if rc == 0:
            rc = snapshot_take(s, chunk, new_chunk, n)
        if rc:
            return rc
        waits[0] = True
        chunk += n
    return 0


cdef int snapshot_take(
    snapshot *s, uint64_t old_chunk, uint64_t first, uint64_t count
) noexcept nogil:
    """Take chunks of the store, and tell the owner when few are left."""
    cdef store *st = s.store
    cdef int rc = store_take(st, old_chunk, first, count)
    if rc == 0 and store_free_bytes(st) < port_load64(&st.low_water_mark):
        port_store64(&st.low_water_mark, 0)
        if s.owner != NULL:
            device_event(s.owner)
    return rc


cdef int snapshot_prepare(snapshot *s, bio *b, uint64_t offset, uint64_t length) noexcept nogil:
    """Give every chunk of a write to the snapshot its exception.

    Where `b.place` allows it the new data goes in at once: into a chunk that is written whole
    instead of the old data, into any other over the copy.
    """
    cdef store *st = s.store
    cdef family *f = s.family
    cdef uint64_t size, chunk, entry, new_chunk, n, count, inside, end = offset + length
    cdef uint64_t origin_size = s.origin.size
    cdef bint waits = False
    cdef int rc = 0, added
    pthread_mutex_lock(&f.prepare)
    if not st.valid or st.overflowed:
        rc = -EIO
    while rc == 0 and offset < end:
        size = chunk_bytes(st)
        chunk = offset >> st.chunk_shift
        inside = offset & (size - 1)
        n = min(end - offset, size - inside)
        entry = exception_find(&st.exceptions, chunk)
        if entry == 0:
            count = 1
            if n == size:
                while (offset + (count + 1) * size <= end
                       and exception_find(&st.exceptions, chunk + count) == 0):
                    count += 1
            rc = store_prepare_exception(st, &new_chunk, &count)
            if rc == -ENOSPC:
                b.snapshot = s
                rc = BIO_FULL
                break
            if n == size and b.place:
                n = count * size
            elif rc == 0:
                count = 1
                rc = copy_device(s.origin, chunk << st.chunk_shift, st.cow,
                                 new_chunk << st.chunk_shift,
                                 min(size, origin_size - (chunk << st.chunk_shift)), COPY_FRESH)
            if rc == 0 and b.place:
                rc = write_device(st.cow, b.data + b.done if b.data != NULL else NULL,
                                  (new_chunk << st.chunk_shift) + inside, n, COPY_FRESH)
                b.placed += n
            if rc == -ENOSPC:
                b.snapshot = s
                rc = BIO_FULL
                break
            if rc == 0:
                rc = snapshot_take(s, chunk, new_chunk, count)
            if rc < 0:
                rc = snapshot_invalidate(s)
                rc = rc if rc else -EIO
                break
            waits = True
        elif entry & ENTRY_PENDING:
            waits = True
        if rc == 0:
            b.done += n
            offset += n
    if waits:
        port_store64(&f.prepared, f.prepared + 1)
        added = group_add(b.group, f)
        rc = rc if rc else added
    pthread_mutex_unlock(&f.prepare)
    return rc


cdef int snapshot_invalidate(snapshot *s) noexcept nogil:
    """Drop the snapshot, on disk and in memory, and tell its device. The prepare mutex is held."""
    cdef store *st = s.store
    if not st.valid:
        return 0
    # A header that cannot be written cannot be helped, as in the kernel; one that must wait, waits.
    if st.persistent and store_write_header(st, 0) == BIO_SUSPENDED:
        return BIO_SUSPENDED
    port_store32(&st.valid, 0)
    if s.owner != NULL:
        device_event(s.owner)
    return 0


cdef int snapshot_full(snapshot *s) noexcept nogil:
    """A write to the snapshot found no room: -EIO, and "PO" overflows where others are dropped."""
    cdef int rc = 0
    pthread_mutex_lock(&s.family.prepare)
    if s.store.persistent and s.store.overflow_supported:
        port_store32(&s.store.overflowed, 1)
    else:
        rc = snapshot_invalidate(s)
    pthread_mutex_unlock(&s.family.prepare)
    return rc if rc else -EIO
