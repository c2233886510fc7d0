"""What run.py does with a trained encoder: encode, search, verify.

Each function is a mode, and its arguments are options of run.py.
"""

import contextlib
import csv
import io
import json
import pathlib
import sys
import zipfile
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rich.console
import rich.progress
from PIL import Image

from unreid_jax import UserError, gallery, progress, report, search
from unreid_jax.data.folder import camera_in
from unreid_jax.encode import flat, load_encoder
from unreid_jax.gallery import Gallery
from unreid_jax.report.crops import Crop, Row, picture
from unreid_jax.values import expand
from unreid_jax.verification import decide
from unreid_jax.workdir import whole_file

_BLOCK = 4096  # features that are written at a time


def encode(
  checkpoint: str, images: str, output: Sequence[str], cache_dir: str
) -> None:
  """Writes names, cameras and features of all images below a folder.

  An output is a .parquet, an .npz, or an .npy with a .csv beside it. When it is
  interrupted, the same command goes on; memory does not grow with the features.
  """
  outputs = _outputs(output, _WRITERS)
  encoder = load_encoder(_folder(checkpoint, "--checkpoint"))
  with _shown():
    found = _update(images, "--images", encoder, cache_dir)
  for path in outputs:
    _WRITERS[path.suffix](found, path)
    _say(f"{len(found):,} features of {found.stored.shape[1]} numbers: {path}")


def find(
  checkpoint: str,
  query: str,
  gallery: str,
  top: int,
  rerank: bool,
  output: Sequence[str],
  cache_dir: str,
) -> None:
  """Shows the images of a gallery that are nearest to a query, or to each.

  The features of the gallery are kept, and brought up to date. An output is a
  .json or an .html.
  """
  outputs = _outputs(output, (".json", ".html"))
  encoder = load_encoder(_folder(checkpoint, "--checkpoint"))
  with _shown():
    images = _update(gallery, "--gallery", encoder, cache_dir)
    if pathlib.Path(query).is_dir():
      queries = _update(query, "--query", encoder, cache_dir)
      paths, features = [queries.path(i) for i in range(len(queries))], queries
    else:
      paths = [expand(query, "--query")]
      features = flat(encoder(paths))
  near = search.rerank if rerank else search.rank
  hits = near(features[:], images, top)
  card = encoder.card.get("same_person")
  results = [
    {
      "query": str(path),
      "hits": list(_hits(images, rows, similarity, card)),
    }
    for path, rows, similarity in zip(paths, *hits, strict=True)
  ]
  for result in results:
    _show(result)
  for path in outputs:
    with whole_file(path, "--output") as file:
      is_page = path.suffix == ".html"
      text = _page(results) if is_page else json.dumps(results, indent=1)
      file.write(text.encode())


def verify(
  checkpoint: str, query: str, gallery: str, far: float | None
) -> None:
  """Says whether two images show the same person, and how sure that is."""
  encoder = load_encoder(_folder(checkpoint, "--checkpoint"))
  one, other = expand(query, "--query"), expand(gallery, "--gallery")
  answer = encoder.same(one, other, far)
  same, distance, accepted, rejected = (x.item() for x in answer)
  source = encoder.threshold()["source"]
  print("the same person" if same else "another person")
  print(f"squared distance {distance:.3f}; measured on {source}:")
  print(f"{100 * accepted:.2g} % of the pairs of different people are as near,")
  print(f"{100 * rejected:.2g} % of the pairs of one person are as far")


def _hits(images, rows, similarity, card) -> Iterator[dict]:
  """The images found, and if the encoder has a threshold, what it says."""
  for row, cosine in zip(rows, similarity.tolist(), strict=True):
    hit = {"image": str(images.path(row)), "similarity": round(cosine, 5)}
    if card:
      answer = decide(np.array([2 - 2 * cosine]), card)
      hit["same_person"] = bool(answer.same[0])
      hit["false_accept_rate"] = round(float(answer.far[0]), 6)
    yield hit


def _show(result):
  print(result["query"])
  for rank, hit in enumerate(result["hits"], 1):
    same = {True: "same", False: "other"}.get(hit.get("same_person"), "")
    print(f"{rank:>5}  {hit['similarity']:.3f}  {same:<5}  {hit['image']}")


def _page(results) -> str:
  """The ranked lists with their pictures, which stand in the page."""
  rows = []
  for result in results:
    crops = [_crop(result["query"], "query", "")]
    for hit in result["hits"]:
      text = f"similarity {hit['similarity']:.3f}"
      if "same_person" in hit:
        text += ", same person" if hit["same_person"] else ", other person"
      crops.append(_crop(hit["image"], "", text))
    rows.append(Row(result["query"], crops))
  part = report.Part("ranked", "The nearest images", rows={"": rows})
  title = f"Search for {len(rows)} image" + "s" * (len(rows) > 1)
  return report.render("report.html", title=title, subtitle="", parts=[part])


def _crop(path, mark, text):
  with Image.open(path) as image:
    return Crop(
      picture(image), f"{pathlib.Path(path).name} {text}".strip(), mark
    )


def _update(folder, option, encoder, cache_dir) -> Gallery:
  """The features of a folder; what is left out is said."""
  found = gallery.update(_folder(folder, option), encoder, cache_dir)
  if found.corrupt:
    _say(
      f"{len(found.corrupt)} files that hold no image are left out; the first: "
      f"{found.folder / found.corrupt[0]}"
    )
  if not len(found):
    raise UserError(f"{option}={folder}: none of its images can be read")
  return found


def _folder(path, option) -> pathlib.Path:
  if not expand(path, option).is_dir():
    raise UserError(f"{option}={path} is no folder: check the path")
  return expand(path, option)


def _outputs(paths, endings) -> list[pathlib.Path]:
  """The files to be written, if they can be; nothing has been done yet."""
  paths = [expand(path, "--output") for path in paths]
  for path in paths:
    if path.suffix not in endings:
      raise UserError(f"--output={path}: end it in {' or '.join(endings)}")
    _folder(path.parent, "--output's folder")
  return paths


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
    lines.writerows((name, camera_in(name)) for name in found.names)


def _write_npz(found, path) -> None:
  texts = {"names": found.names, "cameras": [*map(camera_in, found.names)]}
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
  with (
    whole_file(path, "--output") as file,
    pq.ParquetWriter(file, schema) as writer,
  ):
    for start, block in _blocks(found):
      names = found.names[start : start + len(block)]
      rows = pa.array(np.asarray(block).reshape(-1))
      rows = pa.FixedSizeListArray.from_arrays(rows, width)
      columns = [pa.array(names), pa.array(map(camera_in, names)), rows]
      writer.write_table(pa.table(columns, schema=schema))


_WRITERS = {
  ".parquet": _write_parquet,
  ".npz": _write_npz,
  ".npy": _write_npy,
}


@contextlib.contextmanager
def _shown():
  """Within it, long phases have a bar on the terminal."""
  console = rich.console.Console(stderr=True)

  def show(items, description, total, scale, unit):
    return rich.progress.track(
      items,
      description,
      console=console,
      transient=True,
      disable=not console.is_terminal,
    )

  with progress.shown_by(show):
    yield


def _say(line):
  print(line, file=sys.stderr, flush=True)
