"""Features of a folder as a file for others: .parquet, .npz, .npy with .csv.

Each writer takes a `Gallery` and a path. It writes the names of the images, the
cameras that they name, and the features, block after block.
"""

import csv
import io
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unreid_jax.data.folder import cameras_in
from unreid_jax.gallery import Gallery
from unreid_jax.workdir import whole_file

_BLOCK = 4096  # features


def _blocks(found: Gallery):
  for start in range(0, len(found), _BLOCK):
    yield start, found[start : start + _BLOCK]


def _write_array(found, file) -> None:
  """The features as a file of numpy, block after block."""
  shape = len(found), found.stored.shape[1]
  header = {"descr": "<f4", "fortran_order": False, "shape": shape}
  np.lib.format.write_array_header_1_0(file, header)
  for _, block in _blocks(found):
    file.write(np.ascontiguousarray(block))


def _write_npy(found, path) -> None:
  with whole_file(path, "--output") as file:
    _write_array(found, file)
  with whole_file(path.with_suffix(".csv"), "--output") as file:
    lines = csv.writer(io.TextIOWrapper(file, "utf-8", write_through=True))
    lines.writerow(("name", "camera"))
    lines.writerows(zip(found.names, cameras_in(found.names), strict=True))


def _write_npz(found, path) -> None:
  texts = {"names": found.names, "cameras": cameras_in(found.names)}
  with (
    whole_file(path, "--output") as file,
    zipfile.ZipFile(file, "w") as archive,
  ):
    for name, values in texts.items():
      with archive.open(f"{name}.npy", "w", force_zip64=True) as part:
        np.lib.format.write_array(part, np.array(values))
    with archive.open("features.npy", "w", force_zip64=True) as part:
      _write_array(found, part)


def _write_parquet(found, path) -> None:
  width = found.stored.shape[1]
  kinds = {"name": pa.string(), "camera": pa.string()}
  schema = pa.schema(kinds | {"features": pa.list_(pa.float32(), width)})
  cameras = cameras_in(found.names)
  with (
    whole_file(path, "--output") as file,
    pq.ParquetWriter(file, schema) as writer,
  ):
    for start, block in _blocks(found):
      part = slice(start, start + len(block))
      rows = pa.array(np.asarray(block).reshape(-1))
      rows = pa.FixedSizeListArray.from_arrays(rows, width)
      columns = [found.names[part], cameras[part], rows]
      writer.write_table(pa.table(columns, schema=schema))


WRITERS = {  # by the ending of the file
  ".parquet": _write_parquet,
  ".npz": _write_npz,
  ".npy": _write_npy,
}
