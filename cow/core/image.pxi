# The bottom: mmap'd files. `emit` functions are all that ever happens to a run of image bytes.
#
# An emit function gets a run inside an image, or NULL for a run of zeros that no image holds (a
# zero target, the part of a growing image that no file backs yet), and counts it into bio.done.

cdef int emit_read(bio *b, device *image, uint64_t offset, uint64_t length) noexcept nogil:
    cdef int rc
    if image == NULL:
        rc = port_zero(b.data + b.done, length)
    elif b.copy != COPY_CACHED:
        rc = port_copy_stream(b.data + b.done, image.base + offset, length)
    else:
        rc = port_copy(b.data + b.done, image.base + offset, length)
    if rc and image != NULL:
        # A hole reads as zeros even where the disk has no room for its page.
        return emit_pread(b, image, offset, length)
    b.done += length
    return rc


cdef int emit_pread(bio *b, device *image, uint64_t offset, uint64_t length) noexcept nogil:
    """Read with a system call: for pages that are looked at once and lie far apart.

    Mapping them would cost a page of page table for every 2 MiB of the image.
    """
    cdef int64_t n
    cdef int rc
    if image == NULL:
        rc = port_zero(b.data + b.done, length)
        b.done += length
        return rc
    while length:
        n = pread(image.fd, b.data + b.done, length, <int64_t>offset)
        if n <= 0:
            return -errno if n < 0 else -EIO
        b.done += <uint64_t>n
        offset += <uint64_t>n
        length -= <uint64_t>n
    return 0


cdef int emit_write(bio *b, device *image, uint64_t offset, uint64_t length) noexcept nogil:
    cdef int rc = 0
    if image != NULL:
        rc = image_write(
            image, b.data + b.done if b.data != NULL else NULL, offset, length, b.copy)
        if rc:
            return rc
    b.done += length
    return rc


cdef int emit_nothing(bio *b, device *image, uint64_t offset, uint64_t length) noexcept nogil:
    b.done += length
    return 0


cdef int emit_discard(bio *b, device *image, uint64_t offset, uint64_t length) noexcept nogil:
    """Free the space below a run; it reads as zeros afterwards, as on a loop device."""
    b.done += length
    if image == NULL:
        return 0
    if not image.writable:
        return -EPERM
    if fallocate(image.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                 <int64_t>offset, <int64_t>length) == 0:
        port_store32(&image.sparse, 1)
        return 0
    if errno != EOPNOTSUPP:
        return -errno
    return image_write(image, NULL, offset, length, COPY_CACHED)


cdef int emit_flush(bio *b, device *image, uint64_t offset, uint64_t length) noexcept nogil:
    """The one seam to durability: the run is on the disk when this returns 0."""
    cdef uint64_t first = offset & ~<uint64_t>(PAGE - 1)
    b.done += length
    if image == NULL or not image.writable:
        return 0
    if offset == 0 and length == image.size:
        return -errno if fdatasync(image.fd) else 0
    return -errno if msync(image.base + first, offset + length - first, MS_SYNC) else 0


cdef int emit_reserve(bio *b, device *image, uint64_t offset, uint64_t length) noexcept nogil:
    """Map the pages of a run before they are written, which is cheaper than one fault for each.

    Not in a sparse image: what goes into its holes goes there with COPY_FRESH.
    """
    cdef uint64_t first = offset & ~<uint64_t>(PAGE - 1)
    b.done += length
    if image == NULL or port_load32(&image.sparse):
        return 0
    madvise(image.base + first, offset + length - first, MADV_POPULATE_WRITE)
    return 0                        # what is wrong shows when it is written


cdef int image_map(device *image, bio *b, uint64_t offset, uint64_t length) noexcept nogil:
    cdef uint64_t file_size = port_load64(&image.file_size), backed
    cdef int rc
    if offset + length <= file_size:
        return b.emit(b, image, offset, length)
    if b.op in (WRITE, RESERVE):
        rc = image_grow(image, offset + length)
        return rc if rc else b.emit(b, image, offset, length)
    backed = file_size - offset if offset < file_size else 0
    if backed:
        rc = b.emit(b, image, offset, backed)
        if rc:
            return rc
    return b.emit(b, NULL, 0, length - backed)


cdef int image_grow(device *image, uint64_t file_size) noexcept nogil:
    """Make a growing image's file reach `file_size`, which is at most its device size.

    Only writable images grow.
    """
    cdef int rc = 0
    pthread_mutex_lock(&image.grow_mutex)
    if lseek(image.fd, 0, 2) < <int64_t>image.file_size:
        rc = -EIO                   # cut short: what is lost must not come back as a hole
    elif image.file_size < file_size:
        file_size = min(image.size, (file_size + PAGE - 1) & ~<uint64_t>(PAGE - 1))
        if ftruncate(image.fd, <int64_t>file_size):
            rc = -errno
        else:
            port_store64(&image.file_size, file_size)
    pthread_mutex_unlock(&image.grow_mutex)
    return rc


cdef int image_write(
    device *image, uint8_t *data, uint64_t offset, uint64_t length, int copy
) noexcept nogil:
    """Copy `data` (NULL: zeros) into an image.

    A fault is EIO, unless the file system was full below a hole: then the space is asked for by
    name, and the answer is ENOSPC or a second try.
    """
    cdef int rc, attempt
    if not image.writable:
        return -EPERM
    if data != NULL and (copy == COPY_FRESH and port_load32(&image.sparse)
                         or copy == COPY_CLEAN and image.on_disk):
        return image_pwrite(image, data, offset, length)
    for attempt in range(2):
        if data != NULL and (copy == COPY_STREAM or copy == COPY_FRESH):
            rc = port_copy_stream(image.base + offset, data, length)
        elif data != NULL:
            rc = port_copy(image.base + offset, data, length)
        else:
            rc = port_zero(image.base + offset, length)
        if rc == 0 or attempt or lseek(image.fd, 0, 2) < <int64_t>(offset + length):
            break
        if fallocate(image.fd, 0, <int64_t>offset, <int64_t>length):
            return -ENOSPC if errno == ENOSPC else rc
    return rc


cdef int image_pwrite(
    device *image, uint8_t *data, uint64_t offset, uint64_t length
) noexcept nogil:
    """Write with a system call, which fills new pages without zeroing them first.

    It also marks just what is written as dirty, where a fault would mark a whole large folio. On a
    full disk the answer is ENOSPC, and no signal.
    """
    cdef int64_t n
    if lseek(image.fd, 0, 2) < <int64_t>(offset + length):
        return -EIO                 # cut short: what is lost must not come back as a hole
    while length:
        n = pwrite(image.fd, data, length, <int64_t>offset)
        if n < 0 and errno == EINTR:
            continue
        if n <= 0:
            return -EIO if n == 0 or errno == EFAULT else -errno
        data += n
        offset += <uint64_t>n
        length -= <uint64_t>n
    return 0
