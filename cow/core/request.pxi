# Requests on a device. Everything here runs with the gate held shared.

cdef inline void bio_init(bio *b, int op, emit_fn emit, uint8_t *data) noexcept nogil:
    memset(b, 0, sizeof(bio))
    b.op = op
    b.emit = emit
    b.data = data
    b.place = True
    b.source = FROM_NOWHERE


cdef int device_map(device *d, bio *b, uint64_t offset, uint64_t length) noexcept nogil:
    """Send a range of a device down to the images it is made of, in order."""
    cdef target *t
    cdef uint64_t n, end = offset + length
    cdef int rc, i, low, high
    if length > d.size or offset > d.size - length:
        return -ENXIO if d.removed else -EIO
    if not d.mapped:
        return image_map(d, b, offset, length)
    if d.suspended:
        return BIO_SUSPENDED
    if length == 0:
        return 0
    low = 0
    high = d.live.nr_targets - 1
    while low < high:
        i = (low + high) >> 1
        if d.live.ends[i] <= offset:
            low = i + 1
        else:
            high = i
    while True:
        t = d.live.targets[low]
        n = min(end, d.live.ends[low]) - offset
        rc = t.map(t, b, offset, n)
        offset += n
        if rc or offset == end:
            return rc
        low += 1


cdef inline void device_event(device *d) noexcept nogil:
    """Count an event of a device, and of its mapper, and wake who waits."""
    port_event_raise(&d.events)
    port_event_raise(&d.gate.events)


cdef inline void lock_maps(device *d) noexcept nogil:
    cdef int i
    for i in range(d.nr_locks):
        port_read_lock(&d.locks[i].map)


cdef inline void unlock_maps(device *d) noexcept nogil:
    cdef int i
    for i in range(d.nr_locks - 1, -1, -1):
        port_read_unlock(&d.locks[i].map)


cdef int request(device *d, bio *b, uint64_t offset, uint64_t length) noexcept nogil:
    """Map a range with the exceptions below it held still."""
    cdef int rc
    lock_maps(d)
    rc = device_map(d, b, offset, length)
    unlock_maps(d)
    return rc


cdef int request_read(
    device *d, uint8_t *data, uint64_t offset, uint64_t length, uint64_t *done
) noexcept nogil:
    """Read; `done` counts bytes, and a request that answers BIO_SUSPENDED goes on from there."""
    cdef bio b
    cdef int rc
    bio_init(&b, READ, emit_read, data + done[0])
    rc = request(d, &b, offset + done[0], length - done[0])
    done[0] += b.done
    return rc


cdef int request_write(
    device *d, uint8_t *data, uint64_t offset, uint64_t length, uint64_t *done, int copy=COPY_CACHED
) noexcept nogil:
    """Write `data` (NULL: zeros) in place; where that would change a snapshot, prepare first."""
    cdef bio b
    cdef int rc
    while True:
        bio_init(&b, WRITE, emit_write, data + done[0] if data != NULL else NULL)
        b.copy = copy
        rc = request(d, &b, offset + done[0], length - done[0])
        done[0] += b.done
        if rc == BIO_HELD:
            rc = wait_merge_step(&b)
        elif rc == BIO_SHARED:
            rc = request_prepare(d, data, offset, length, done)
            copy = COPY_CLEAN
        else:
            return rc
        if rc or done[0] == length:
            return rc


cdef int request_prepare(
    device *d, uint8_t *data, uint64_t offset, uint64_t length, uint64_t *done
) noexcept nogil:
    """Break sharing for what is left of a write. Whatever landed in fresh chunks counts as done."""
    cdef bio b
    cdef commit_group group
    cdef int rc, committed
    cdef uint64_t prefix
    group.count = 0
    bio_init(&b, PREPARE, emit_nothing, data + done[0] if data != NULL else NULL)
    b.group = &group
    rc = device_map(d, &b, offset + done[0], length - done[0])
    committed = group_commit(&group)
    if committed:
        return committed
    if rc == BIO_FULL:
        # As the kernel does: what comes before the chunk that found no room is written.
        prefix = done[0] + b.done
        rc = request_write(d, data, offset, prefix, done) if done[0] < prefix else 0
        return rc if rc else snapshot_full(b.snapshot)
    if rc == 0 and group.sound and b.placed == length - done[0]:
        done[0] = length
    return 0 if rc == BIO_MORE else rc


cdef int wait_merge_step(bio *b) noexcept nogil:
    """Wait until the merge step that holds a write is over."""
    port_event_wait(&b.snapshot.family.merge_steps, b.seen, WAIT_SLICE)
    return -EIO if port_load32(&b.snapshot.merge_failed) else 0


cdef int write_device(
    device *d, uint8_t *data, uint64_t offset, uint64_t length, int copy=COPY_CACHED
) noexcept nogil:
    """Write to a device below, with no map lock held by the caller."""
    cdef bio b
    cdef uint64_t done = 0
    if not d.plain:
        return request_write(d, data, offset, length, &done)
    bio_init(&b, WRITE, emit_write, data)
    b.copy = copy
    return device_map(d, &b, offset, length)


cdef int read_device(device *d, uint8_t *data, uint64_t offset, uint64_t length) noexcept nogil:
    cdef uint64_t done = 0
    return request_read(d, data, offset, length, &done)


cdef int flush_device(device *d, uint64_t offset, uint64_t length) noexcept nogil:
    cdef bio b
    bio_init(&b, FLUSH, emit_flush, NULL)
    return device_map(d, &b, offset, length)


cdef inline int barrier(device *d, uint64_t offset, uint64_t length) noexcept nogil:
    """With durability "power": what was written to the range is on the disk before what follows."""
    return flush_device(d, offset, length) if d.gate.power else 0


cdef struct copy_target:
    device *dev
    uint64_t offset
    int copy


cdef int emit_copy(bio *b, device *image, uint64_t offset, uint64_t length) noexcept nogil:
    cdef copy_target *to = <copy_target *>b.context
    cdef int rc = write_device(
        to.dev, image.base + offset if image != NULL else NULL, to.offset + b.done, length,
        to.copy)
    b.done += length
    return rc


cdef int copy_device(
    device *source, uint64_t source_offset, device *into, uint64_t into_offset, uint64_t length,
    int copy
) noexcept nogil:
    """Copy between devices: straight from image to image where the source needs no lock.

    Otherwise by way of a bounce buffer, so that no map lock is held while the target is written.
    """
    cdef bio b
    cdef copy_target to
    cdef uint8_t *bounce
    cdef uint64_t n
    cdef int rc = 0
    if source.plain:
        bio_init(&b, READ, emit_copy, NULL)
        to.dev = into
        to.offset = into_offset
        to.copy = copy
        b.context = &to
        rc = device_map(source, &b, source_offset, length)
        port_stream_end()
        if rc != -EIO:
            return rc
        rc = 0                      # it may be a hole on a full disk: read it the slow way
    bounce = <uint8_t *>malloc(min(length, <uint64_t>BOUNCE_SIZE))
    if bounce == NULL:
        return -ENOMEM
    while length and rc == 0:
        n = min(length, <uint64_t>BOUNCE_SIZE)
        rc = read_device(source, bounce, source_offset, n)
        if rc == 0:
            rc = write_device(into, bounce, into_offset, n, copy)
        source_offset += n
        into_offset += n
        length -= n
    free(bounce)
    return rc


# Batches.

cdef int emit_prefetch(bio *b, device *image, uint64_t offset, uint64_t length) noexcept nogil:
    if image != NULL:
        port_prefetch(image.base + offset)
        port_prefetch(image.base + offset + 64)
        port_prefetch(image.base + offset + 128)
        port_prefetch(image.base + offset + 192)
    b.done += length
    return 0


cdef int request_read_many(
    device *d, uint8_t *data, const uint64_t *offsets, uint64_t count, uint64_t size, uint64_t *done
) noexcept nogil:
    """Read `count` blocks of `size` bytes; `done` counts blocks."""
    cdef bio b, ahead
    cdef uint64_t i, last
    cdef int copy = COPY_STREAM if count * size > STREAM_SIZE else COPY_CACHED
    cdef int rc = 0
    bio_init(&ahead, READ, emit_prefetch, NULL)
    while done[0] < count and rc == 0:
        last = min(count, done[0] + max(<uint64_t>1, <uint64_t>BATCH_BYTES / size))
        lock_maps(d)
        for i in range(done[0], last):
            if i + PREFETCH_AHEAD < last:
                device_map(d, &ahead, offsets[i + PREFETCH_AHEAD], min(size, <uint64_t>SECTOR))
            bio_init(&b, READ, emit_read, data + i * size)
            b.copy = copy
            rc = device_map(d, &b, offsets[i], size)
            if rc:
                break
            done[0] += 1
        port_stream_end()
        unlock_maps(d)
    return rc


cdef int request_write_many(
    device *d, uint8_t *data, const uint64_t *offsets, uint64_t count, uint64_t size, uint64_t *done
) noexcept nogil:
    """Write `count` blocks of `size` bytes in order; `done` counts blocks.

    Blocks are written in place, many under one taking of the locks, up to the first that is still
    shared. From there on a slice of them is prepared and committed together, so that one pair of
    barriers serves them all; then writing in place goes on, in order, so that the last write to a
    byte wins.
    """
    cdef prepared_slice prepared
    cdef uint64_t block_done
    cdef int copy = COPY_STREAM if count * size > STREAM_SIZE else COPY_CACHED
    cdef int rc = 0
    prepared.first = prepared.last = 0
    prepared.placed = NULL
    while done[0] < count and rc == 0:
        rc = write_in_place(d, data, offsets, count, size, done, copy, &prepared)
        if rc == BIO_SHARED and done[0] >= prepared.last:
            rc = prepare_slice(d, data, offsets, count, size, done[0], &prepared)
        elif rc in (BIO_SHARED, BIO_HELD):
            # One that found no room, or met a merge: by itself, with its own error.
            block_done = 0
            rc = request_write(
                d, data + done[0] * size, offsets[done[0]], size, &block_done, copy)
            port_stream_end()
            if rc == 0:
                done[0] += 1
    free(prepared.placed)
    return rc


# The blocks [first, last) of a batch: prepared and committed. `placed` tells which of them are in
# fresh chunks already.
cdef struct prepared_slice:
    uint64_t first
    uint64_t last
    uint8_t *placed


cdef int write_in_place(
    device *d, uint8_t *data, const uint64_t *offsets, uint64_t count, uint64_t size,
    uint64_t *done, int copy, prepared_slice *prepared
) noexcept nogil:
    """Write blocks from `done` on, in place, until one stops the walk."""
    cdef bio b, ahead
    cdef uint64_t i, last = min(count, done[0] + max(<uint64_t>1, <uint64_t>BATCH_BYTES / size))
    cdef int rc = 0
    bio_init(&ahead, READ, emit_prefetch, NULL)
    lock_maps(d)
    for i in range(done[0], last):
        if prepared.first <= i < prepared.last and prepared.placed[i - prepared.first]:
            done[0] += 1
            continue
        if i + PREFETCH_AHEAD < last:
            device_map(d, &ahead, offsets[i + PREFETCH_AHEAD], min(size, <uint64_t>SECTOR))
        bio_init(&b, WRITE, emit_write, data + i * size)
        b.copy = COPY_CLEAN if prepared.first <= i < prepared.last else copy
        rc = device_map(d, &b, offsets[i], size)
        if rc:
            break
        done[0] += 1
    port_stream_end()
    unlock_maps(d)
    return rc


cdef int prepare_slice(
    device *d, uint8_t *data, const uint64_t *offsets, uint64_t count, uint64_t size,
    uint64_t first, prepared_slice *prepared
) noexcept nogil:
    """Prepare the blocks from `first` on and commit them together."""
    cdef bio b, ahead
    cdef commit_group group
    cdef uint64_t i, last = min(count, first + BATCH_PREPARE)
    cdef int rc
    if prepared.placed == NULL:
        prepared.placed = <uint8_t *>malloc(BATCH_PREPARE)
        if prepared.placed == NULL:
            return -ENOMEM
    bio_init(&ahead, READ, emit_prefetch, NULL)
    group.count = 0
    for i in range(first, last):
        if i + PREFETCH_AHEAD < last:
            device_map(d, &ahead, offsets[i + PREFETCH_AHEAD], min(size, <uint64_t>SECTOR))
        bio_init(&b, PREPARE, emit_nothing, data + i * size)
        b.group = &group
        if device_map(d, &b, offsets[i], size):
            last = i                # it gets its turn and its error when those before are written
            break
        prepared.placed[i - first] = b.placed == size
    prepared.first = first
    prepared.last = last
    rc = group_commit(&group)
    if rc:
        prepared.last = first
    elif not group.sound:
        memset(prepared.placed, 0, last - first)
    if rc == 0 and last == first:
        prepared.last = first + 1      # alone
        prepared.placed[0] = 0
    return rc
