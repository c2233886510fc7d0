"""TFDS builders, one file for each public set; `layout` is what they share.

They read the folder or zip as people have it, never download, and keep the
encoded images as array_record files, in the order of the sorted file names. A
file's name is the dataset's, and the `name` of the builder in it.
"""
