"""The mapper as a process: a control socket, its server and its client.

Only the server imports the engine; a client needs the standard library alone, so that a command
answers at once.
"""
