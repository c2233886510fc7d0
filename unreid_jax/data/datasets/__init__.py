"""TFDS builders, one file for each public set; `layout` is what they share.

They read the folder or zip as people have it and never download. `data.load`
takes the list of files from them; prepared, which is nobody's duty, they keep
the encoded images as array_record files, in the order of the sorted file names.
A file's name is the dataset's, and the `name` of the builder in it.
"""
