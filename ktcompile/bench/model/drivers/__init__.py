"""What runs in the processes of contenders: a script and one module for each kind of library.

They are read by the Python that a peer is installed in, so they import nothing of ktcompile but for ktcompile's own
contenders, and their folder holds no module that could stand before another library's.
"""
