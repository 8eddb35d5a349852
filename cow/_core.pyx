"""The hot path: images in memory, sector remapping, exceptions, copy-out, merge, flush.

Units. Offsets, lengths and sizes are bytes unless the name says sectors or chunks.

Errors. Every function below the classes is `noexcept nogil` and answers 0, a negative errno, or
one of the positive BIO_ codes: the request has to wait for something and is then tried again from
where it stands. The public methods turn a negative errno into an OSError, once.

Locks, in the order in which they are taken; docs/architecture.md tells why.
  gate      of the mapper: shared by every request from start to end; exclusive while a table is
            swapped, a device suspended or a snapshot registered. What it guards never changes
            under a request: the graph of devices, who is suspended, the list of snapshots.
  commit    a mutex of the family: one thread writes records; it works for all who wait.
  prepare   a mutex of the family: reserving store chunks and copying into them.
  map       a reader-writer lock of the family: shared by whatever follows exceptions, exclusive
            where they become visible or vanish. Nothing waits, copies or flushes under the
            exclusive lock. A device takes the map locks of all families below it at once, in
            order of their number.
Families are ordered too: a family's devices may lie on other families, never in a circle (a table
that would close one is refused); commit and prepare of the upper family are taken before any lock
of a lower one, and no map lock is held while another device is written.

The sections, in order of dependence:
"""

include "core/types.pxi"        # constants, structs, declarations from port.h
include "core/exceptions.pxi"   # the exception table: origin chunk -> store chunk
include "core/image.pxi"        # the bottom: mmap'd files, and what is done with a run of bytes
include "core/request.pxi"      # requests on a device: map, read, write, copy, flush
include "core/store.pxi"        # the COW store: header, areas, reserve, commit
include "core/settled.pxi"      # what no snapshot of an origin shares any more
include "core/family.pxi"       # an origin with its snapshots: prepare and commit
include "core/targets.pxi"      # map functions: what each target does with a request
include "core/mirror.pxi"       # legs that hold the same bytes
include "core/merge.pxi"        # moving exceptions back into the origin
include "core/look.pxi"         # extents and views
include "core/devices.pxi"      # Gate, Family, BlockDevice, FileDevice, MappedDevice
include "core/tables.pxi"       # Map, and an object for each target
include "core/snapshots.pxi"    # ExceptionStore, Snapshot
include "core/nbd.pxi"          # NBD from socket to image
include "core/fuse.pxi"         # FUSE from /dev/fuse to image
