# Looking without reading: what a range is made of.

cdef struct extent:
    uint64_t offset
    uint64_t length
    uint8_t source
    uint8_t zero
    uint8_t pad[6]

cdef enum:
    KNOWN_RUNS = 4                  # a snapshot looks at its store and its origin in turn

cdef struct known_run:              # data of an image, or a hole
    device *image
    uint64_t offset
    uint64_t end
    bint data

cdef struct extents:
    extent *items
    uint64_t count
    uint64_t capacity
    uint64_t start
    uint64_t most                   # stop there, and ask only what is zero; 0: look at all
    known_run known[KNOWN_RUNS]     # to find the end of a run takes time that grows with it
    uint32_t oldest

cdef struct run:
    uint64_t runs
    device *image
    uint64_t offset
    uint64_t length


cdef int emit_run(bio *b, device *image, uint64_t offset, uint64_t length) noexcept nogil:
    """Count the pieces a range lies in; neighbours of one image are one piece."""
    cdef run *r = <run *>b.context
    if b.done == 0:
        r.runs = 0                  # the pass before met a suspended device
    b.done += length
    if r.runs and image == r.image and image != NULL and offset == r.offset + r.length:
        r.length += length
        return 0
    r.runs += 1 if image != NULL else 2
    r.image = image
    r.offset = offset
    r.length = length
    return 0


cdef int emit_extent(bio *b, device *image, uint64_t offset, uint64_t length) noexcept nogil:
    """Append a run to the extents, cut at the holes of the image."""
    cdef int source = FROM_ORIGIN if b.source == FROM_NOWHERE else b.source
    cdef extents *e = <extents *>b.context
    cdef known_run *found
    cdef uint64_t n
    cdef int rc = 0
    if b.done == 0:                 # the pass before met a suspended device
        e.count = 0
        memset(e.known, 0, sizeof(e.known))
    if image == NULL or not port_load32(&image.sparse):
        rc = extents_append(b, length, FROM_ZERO if image == NULL else source, image == NULL)
        b.done += length
        return rc
    while length and rc == 0:
        found = extents_look(e, image, offset)
        n = min(length, found.end - offset)
        rc = extents_append(b, n, source, not found.data)
        b.done += n
        offset += n
        length -= n
    return rc


cdef known_run *extents_look(extents *e, device *image, uint64_t offset) noexcept nogil:
    """Return the run of data, or the hole, that an offset of a sparse image lies in."""
    cdef known_run *run
    cdef int64_t at
    cdef int i
    for i in range(KNOWN_RUNS):
        run = &e.known[i]
        if run.image == image and run.offset <= offset < run.end:
            return run
    run = &e.known[e.oldest]
    e.oldest = (e.oldest + 1) % KNOWN_RUNS
    run.image = image
    run.offset = offset
    at = lseek(image.fd, <int64_t>offset, SEEK_DATA)
    run.data = at == <int64_t>offset or at < 0 and errno != ENXIO
    if run.data:
        at = lseek(image.fd, <int64_t>offset, SEEK_HOLE)
    run.end = <uint64_t>at if at > <int64_t>offset else ~<uint64_t>0
    return run


cdef int extents_append(bio *b, uint64_t length, int source, bint zero) noexcept nogil:
    cdef extents *e = <extents *>b.context
    cdef uint64_t capacity
    cdef void *items
    cdef extent *last
    if e.count:
        last = &e.items[e.count - 1]
        if last.zero == zero and (e.most or last.source == source):
            last.length += length
            return 0
        if e.count == e.most:
            return BIO_ENOUGH
    if e.count == e.capacity:
        capacity = max(<uint64_t>64, 2 * e.capacity)
        items = realloc(e.items, capacity * sizeof(extent))
        if items == NULL:
            return -ENOMEM
        e.items = <extent *>items
        e.capacity = capacity
    last = &e.items[e.count]
    last.offset = e.start + b.done
    last.length = length
    last.source = <uint8_t>source
    last.zero = 1 if zero else 0
    e.count += 1
    return 0


cdef int copy_out(object buffer, void *source, size_t size) except -1:
    cdef Py_buffer view
    PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
    memcpy(view.buf, source, size)
    PyBuffer_Release(&view)
    return 0
