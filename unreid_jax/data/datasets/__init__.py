"""TFDS builders of the public sets, one a file; `layout` is what they share.

They read the folder or zip as people have it, never download, and keep the
encoded images as array_record files, in the order of the sorted file names.
"""
