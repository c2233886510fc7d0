"""Several processes, on one machine or many, that train one encoder.

`place` says where they are, `launch` starts those of this machine and watches
them, and in each of them `peers` speaks with the others.
"""
