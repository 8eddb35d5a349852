# Map functions: what each target does with its part of a request.

cdef int linear_map(target *t, bio *b, uint64_t offset, uint64_t length) noexcept nogil:
    return device_map(t.dev, b, t.dev_start + (offset - t.start), length)


cdef int striped_map(target *t, bio *b, uint64_t offset, uint64_t length) noexcept nogil:
    """Chunk c of the target lies on stripe c mod n, as its chunk c div n."""
    cdef uint64_t chunk, inside, n
    cdef stripe *leg
    cdef int rc
    offset -= t.start
    while length:
        chunk = offset / t.chunk_size
        inside = offset - chunk * t.chunk_size
        n = min(length, t.chunk_size - inside) if t.nr_stripes > 1 else length
        leg = &t.stripes[chunk % t.nr_stripes]
        rc = device_map(leg.dev, b, leg.start + chunk / t.nr_stripes * t.chunk_size + inside, n)
        if rc:
            return rc
        offset += n
        length -= n
    return 0


cdef int zero_map(target *t, bio *b, uint64_t offset, uint64_t length) noexcept nogil:
    return b.emit(b, NULL, 0, length)


cdef int error_map(target *t, bio *b, uint64_t offset, uint64_t length) noexcept nogil:
    """error: nothing but a flush succeeds; the kernel does not even send it that."""
    return 0 if b.op == FLUSH else -EIO


cdef int origin_map(target *t, bio *b, uint64_t offset, uint64_t length) noexcept nogil:
    """snapshot-origin: writes pass once no snapshot needs the old data."""
    cdef family *f = t.dev.family
    cdef uint64_t n
    cdef int rc
    if b.op == DISCARD:
        return -EOPNOTSUPP
    if b.op == WRITE:
        n = family_private(f, offset, length)
        rc = device_map(t.dev, b, offset, n) if n else 0
        return rc if rc or n == length else BIO_SHARED
    if b.op == PREPARE:
        if f.nr_snapshots and settled_run(&f.settled, offset, length) < length:
            b.place = False
            rc = family_prepare(f, b.group, offset, length)
            if rc:
                return rc
    return device_map(t.dev, b, offset, length)


cdef int snapshot_map(target *t, bio *b, uint64_t offset, uint64_t length) noexcept nogil:
    cdef snapshot *s = t.snapshot
    cdef store *st = s.store
    if b.op == FLUSH:
        return device_map(st.cow, b, 0, st.cow.size)
    if not port_load32(&st.valid):
        return -EIO
    if b.op == PREPARE:
        return snapshot_prepare(s, b, offset, length)
    if b.op in (WRITE, DISCARD) and port_load32(&st.overflowed):
        return -EIO
    if b.op == DISCARD:
        return snapshot_discard(s, b, offset, length)
    return exceptions_map(s, b, offset, length)


cdef int exceptions_map(snapshot *s, bio *b, uint64_t offset, uint64_t length) noexcept nogil:
    """Send each run to the store or the origin; a write stops at a chunk without exception."""
    cdef store *st = s.store
    cdef uint64_t size = chunk_bytes(st), end = offset + length
    cdef uint64_t chunk, last, run, first, n, inside
    cdef bint outermost = b.source == FROM_NOWHERE
    cdef int rc
    last = (end - 1) >> st.chunk_shift
    while offset < end:
        chunk = offset >> st.chunk_shift
        inside = offset & (size - 1)
        run = exception_run(&st.exceptions, chunk, last - chunk + 1, &first)
        n = min(end - offset, (run << st.chunk_shift) - inside)
        if first:
            if outermost:
                b.source = FROM_COW
            rc = device_map(st.cow, b, ((first - 1) << st.chunk_shift) + inside, n)
        elif b.op == WRITE:
            return BIO_SHARED
        else:
            if outermost:
                b.source = FROM_ORIGIN
            rc = device_map(s.origin, b, offset, n)
        if rc:
            return rc
        offset += n
    if outermost:
        b.source = FROM_NOWHERE
    return 0


cdef int snapshot_discard(snapshot *s, bio *b, uint64_t offset, uint64_t length) noexcept nogil:
    """Discard chunk by chunk: whole ones of ours are zeroed, parts forwarded, others left alone.

    The kernel takes any discard as long as a chunk for one of a whole chunk, and zeroes its
    neighbour where it starts in the middle (dm-snapshot.md, 4.4); here only what is addressed.
    """
    cdef store *st = s.store
    cdef uint64_t size = chunk_bytes(st), entry, n, inside, where
    cdef int rc
    if not s.discard_zeroes_cow:
        return -EOPNOTSUPP
    while length:
        inside = offset & (size - 1)
        n = min(length, size - inside)
        entry = exception_find(&st.exceptions, offset >> st.chunk_shift)
        rc = 0
        if entry_complete(entry):
            where = (entry_chunk(entry) << st.chunk_shift) + inside
            if n == size:
                rc = write_zeroes_below(st.cow, b, where, n)
            else:
                rc = device_map(st.cow, b, where, n)
        if rc == 0 and s.discard_passdown_origin:
            rc = device_map(s.origin, b, offset, n)
        if rc:
            return rc
        offset += n
        length -= n
    return 0


cdef int write_zeroes_below(device *d, bio *b, uint64_t offset, uint64_t length) noexcept nogil:
    """Zero a run in place as part of a request that holds the map locks."""
    cdef bio zeroes
    bio_init(&zeroes, WRITE, emit_write, NULL)
    return device_map(d, &zeroes, offset, length)


cdef int merge_map(target *t, bio *b, uint64_t offset, uint64_t length) noexcept nogil:
    """snapshot-merge: reads as the snapshot; writes what has no exception any more below."""
    cdef snapshot *s = t.snapshot
    cdef store *st = s.store
    cdef uint64_t size = chunk_bytes(st), end = offset + length
    cdef uint64_t chunk, last, run, first, n, i, inside
    cdef int rc
    if b.op == FLUSH:
        rc = device_map(s.origin, b, 0, s.origin.size)
        return rc if rc else device_map(st.cow, b, 0, st.cow.size)
    if b.op == DISCARD:
        if not s.discard_zeroes_cow:
            return -EOPNOTSUPP
        b.done += length
        return 0
    if b.op not in (WRITE, PREPARE):
        if not port_load32(&st.valid):
            return device_map(s.origin, b, offset, length)
        return exceptions_map(s, b, offset, length)
    last = (end - 1) >> st.chunk_shift if st.chunk_shift else 0
    while offset < end:
        if port_load32(&st.valid):
            chunk = offset >> st.chunk_shift
            inside = offset & (size - 1)
            run = exception_run(&st.exceptions, chunk, last - chunk + 1, &first)
            n = min(end - offset, (run << st.chunk_shift) - inside)
        else:
            first = 0
            n = end - offset
        if first == 0:
            rc = origin_map(t, b, offset, n)
        elif b.op == PREPARE:
            rc = b.emit(b, NULL, 0, n)
        else:
            for i in range(run):
                if exception_find(&st.exceptions, chunk + i) & ENTRY_MERGING:
                    if i == 0:
                        b.snapshot = s
                        b.seen = port_event_count(&s.family.merge_steps)
                        return BIO_HELD
                    n = min(n, (i << st.chunk_shift) - inside)
                    break
            rc = device_map(st.cow, b, ((first - 1) << st.chunk_shift) + inside, n)
        if rc:
            return rc
        offset += n
    return 0


cdef int filter_map(target *t, bio *b, uint64_t offset, uint64_t length) noexcept nogil:
    """A target written in Python (delay, flakey): it is asked first, then the range is linear."""
    cdef uint64_t below = t.dev_start + (offset - t.start)
    cdef uint8_t *bounce
    cdef bio inner
    cdef int rc
    if b.op in (PREPARE, EXTENTS) or b.emit == emit_prefetch:
        return device_map(t.dev, b, below, length)
    rc = filter_ask(t, b.op, offset, length)
    if rc < 0:
        return rc
    if rc == FILTER_DROP:
        return b.emit(b, NULL, 0, length) if b.op == READ else emit_nothing(b, NULL, 0, length)
    if rc == FILTER_PASS or b.op not in (READ, WRITE):
        return device_map(t.dev, b, below, length)
    bounce = <uint8_t *>calloc(length, 1)
    if bounce == NULL:
        return -ENOMEM
    if b.op == READ:
        bio_init(&inner, READ, emit_read, bounce)
        rc = device_map(t.dev, &inner, below, length)
        if rc == 0:
            rc = filter_mangle(t, b.op, offset, bounce, length)
        if rc == 0:
            rc = port_copy(b.data + b.done, bounce, length)
            b.done += length
    else:
        rc = port_copy(bounce, b.data + b.done, length) if b.data != NULL else 0
        if rc == 0:
            rc = filter_mangle(t, b.op, offset, bounce, length)
        if rc == 0:
            bio_init(&inner, WRITE, emit_write, bounce)
            rc = device_map(t.dev, &inner, below, length)
            b.done += inner.done
    free(bounce)
    return rc
