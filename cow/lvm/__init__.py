"""LVM2: read and write volume groups in image files, as LVM does, without root or kernel."""
