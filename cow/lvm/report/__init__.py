"""Reports: the fields of lvs, vgs and pvs, selected, sorted and printed as LVM's reports are.

    live        what the devices of a mapper tell about LVs
    fields      the table of all fields
    values      what stands in them
    selection   the language of -S
    table       rows to lines: columns, prefixes, JSON

Nothing here changes or prints anything: VGs and their devices go in, lines come out.
"""
