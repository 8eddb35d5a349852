# A mirror: legs that hold the same bytes. Reads come from one leg, everything else goes to all.
#
# The first leg counts: where a region is not in sync the others are brought in line with it. So a
# write that the first leg refuses fails; one that another leg refuses is done, and leaves its
# regions out of sync.

cdef int mirror_map(target *t, bio *b, uint64_t offset, uint64_t length) noexcept nogil:
    offset -= t.start
    if b.op in (WRITE, PREPARE, DISCARD, FLUSH):
        return mirror_map_all(t.mirror, b, offset, length)
    return mirror_map_one(t.mirror, b, offset, length)


cdef int mirror_map_one(mirror *m, bio *b, uint64_t offset, uint64_t length) noexcept nogil:
    """Send a request to the first leg that is good, and then to the next if it fails there."""
    cdef bio before = b[0]
    cdef leg *one
    cdef int i, rc
    for i in range(m.nr_legs):
        one = &m.legs[i]
        if port_load32(&one.failed):
            continue
        if i and not mirror_in_sync(m, offset, length):
            break
        b[0] = before
        rc = device_map(one.dev, b, one.start + offset, length)
        if rc != -EIO or b.op != READ:
            return rc
        leg_fail(m, one, LEG_READ)
    return -EIO


cdef int mirror_map_all(mirror *m, bio *b, uint64_t offset, uint64_t length) noexcept nogil:
    """Send a request to every leg. What stops at one of them starts again at all."""
    cdef bio before = b[0], done
    cdef leg *one
    cdef int i, rc
    before.place = False            # data placed for one leg would not reach the others
    for i in range(m.nr_legs):
        one = &m.legs[i]
        b[0] = before
        rc = device_map(one.dev, b, one.start + offset, length)
        if rc > 0:
            b.done = before.done
            return rc
        if rc == -EIO and b.op != DISCARD:
            leg_fail(m, one, <uint32_t>(LEG_FLUSH if b.op == FLUSH else LEG_WRITE))
        if rc and (i == 0 or b.op == DISCARD):
            return rc
        if rc:
            mirror_lose_sync(m, offset, length)
        if i == 0:
            done = b[0]
    b[0] = done
    return 0


cdef void leg_fail(mirror *m, leg *one, uint32_t kind) noexcept nogil:
    cdef uint32_t failed = port_load32(&one.failed)
    if failed & kind == 0:
        port_store32(&one.failed, failed | kind)
        if m.owner != NULL:
            device_event(m.owner)


cdef bint mirror_in_sync(mirror *m, uint64_t offset, uint64_t length) noexcept nogil:
    """Tell whether all legs hold the same in a range."""
    cdef uint64_t region
    for region in range(offset / m.region_size, (offset + length - 1) / m.region_size + 1):
        if port_load64(&m.out_of_sync[region / 64]) >> (region % 64) & 1:
            return False
    return True


cdef void mirror_lose_sync(mirror *m, uint64_t offset, uint64_t length) noexcept nogil:
    cdef uint64_t region
    for region in range(offset / m.region_size, (offset + length - 1) / m.region_size + 1):
        port_or64(&m.out_of_sync[region / 64], <uint64_t>1 << (region % 64))
