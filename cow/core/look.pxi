# Looking without reading: what a range is made of.

cdef struct extent:
    uint64_t offset
    uint64_t length
    uint8_t source
    uint8_t zero
    uint8_t pad[6]

cdef struct extents:
    extent *items
    uint64_t count
    uint64_t capacity
    uint64_t start
    uint64_t most                   # stop there, and ask only what is zero; 0: look at all

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
    cdef int64_t data, hole
    cdef uint64_t n
    cdef int rc = 0
    if b.done == 0:
        (<extents *>b.context).count = 0    # the pass before met a suspended device
    if image == NULL or not port_load32(&image.sparse):
        rc = extents_append(b, length, FROM_ZERO if image == NULL else source, image == NULL)
        b.done += length
        return rc
    while length and rc == 0:
        data = lseek(image.fd, <int64_t>offset, SEEK_DATA)
        if data < 0 and errno == ENXIO:
            data = <int64_t>(offset + length)
        elif data < 0:
            data = <int64_t>offset
        if <uint64_t>data > offset:
            n = min(length, <uint64_t>data - offset)
            rc = extents_append(b, n, source, True)
        else:
            hole = lseek(image.fd, <int64_t>offset, SEEK_HOLE)
            n = min(length, <uint64_t>hole - offset) if hole > <int64_t>offset else length
            rc = extents_append(b, n, source, False)
        b.done += n
        offset += n
        length -= n
    return rc


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
