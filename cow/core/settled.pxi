# The settled map: a bit for each granule of an origin that no snapshot shares any more.
#
# Where every snapshot has its copy, a write need not ask each of them again, so that many snapshots
# cost a rewrite no more than one. A granule is the smallest chunk of the snapshots. Bits are set
# with the map lock held shared, by whoever found nothing shared; they are cleared all together,
# with the gate held exclusively, when a snapshot joins the family. In between none has to be
# cleared: an exception vanishes only by merging, and a snapshot that merges gets no copies.

cdef void settled_free(settled_map *m) noexcept nogil:
    if m.words != NULL:
        munmap(m.words, m.size)
    memset(m, 0, sizeof(settled_map))


cdef void settled_reset(settled_map *m, int granule_shift, uint64_t origin_size) noexcept nogil:
    """Forget everything. A shift of 0 is "no snapshots"; without memory nothing is ever settled."""
    cdef uint64_t size = (((origin_size >> granule_shift) >> 6) + 1) * sizeof(uint64_t)
    cdef void *p
    settled_free(m)
    if granule_shift == 0:
        return
    p = mmap(NULL, size, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if p == MAP_FAILED:
        return
    m.words = <uint64_t *>p
    m.size = size
    m.granule_shift = granule_shift
    m.nr_granules = origin_size >> granule_shift    # one that is cut by the end never settles


cdef inline uint64_t settled_run(settled_map *m, uint64_t offset, uint64_t length) noexcept nogil:
    """Count the bytes of an origin range, from its start, that are known to be shared by nobody."""
    cdef uint64_t granule = offset >> m.granule_shift
    cdef uint64_t end = min(((offset + length - 1) >> m.granule_shift) + 1, m.nr_granules)
    cdef uint64_t first = granule, open_
    while granule < end:
        open_ = ~port_load64(&m.words[granule >> 6]) >> (granule & 63)
        if open_:
            granule += port_lowest_bit(open_)
            break
        granule += 64 - (granule & 63)
    granule = min(granule, end)
    if granule <= first:
        return 0
    return min(length, (granule << m.granule_shift) - offset)


cdef void settled_set(settled_map *m, uint64_t offset, uint64_t length) noexcept nogil:
    """Note that nobody shares a range: its granules from the first that starts in it.

    The last one may reach past the range; chunks are no smaller, so it is shared by nobody either.
    """
    cdef uint64_t size = <uint64_t>1 << m.granule_shift
    cdef uint64_t granule = (offset + size - 1) >> m.granule_shift
    cdef uint64_t end = min((offset + length + size - 1) >> m.granule_shift, m.nr_granules)
    cdef uint64_t n
    while granule < end:
        n = min(end - granule, 64 - (granule & 63))
        port_or64(&m.words[granule >> 6], (~<uint64_t>0 >> (64 - n)) << (granule & 63))
        granule += n
