"""What run.py does with an encoder: encode, search, verify, export.

Each function is a mode, and its arguments are options of run.py; the checkpoint
and the card are those of `load_encoder`.
"""

import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import rich.console
import rich.progress

from unreid_jax import UserError, progress, report
from unreid_jax.card import Card
from unreid_jax.data.images import decode
from unreid_jax.encode import Encoder, flat, load_encoder
from unreid_jax.export import export as write_encoder
from unreid_jax.feature_files import WRITERS
from unreid_jax.gallery import Gallery, update
from unreid_jax.index import rank_approximately
from unreid_jax.report.crops import Crop, Row, picture
from unreid_jax.search import rank
from unreid_jax.search import rerank as rank_anew
from unreid_jax.values import expand
from unreid_jax.verification import RATES, decide
from unreid_jax.workdir import Workdir, whole_file
from unreid_jax.workdir.writer import sent_to

_ON_A_PAGE = 100  # queries, with their pictures


def encode(
  checkpoint: str,
  images: str,
  output: Sequence[str],
  cache_dir: str = "",
  card: Card | None = None,
) -> None:
  """Writes names, cameras and features of all images below a folder.

  An output is a .parquet, an .npz, or an .npy with a .csv beside it. When it is
  interrupted, the same command goes on; memory does not grow with the features.
  """
  outputs = _outputs(output, WRITERS)
  encoder = _open(checkpoint, card)
  with _shown():
    found = _update(images, "--images", encoder, cache_dir)
  for path in outputs:
    WRITERS[path.suffix](found, path)
    _say(f"{len(found):,} features of {found.stored.shape[1]} numbers: {path}")


def search(
  checkpoint: str,
  query: str,
  gallery: str,
  top: int = 10,
  rerank: bool = False,
  output: Sequence[str] = (),
  cache_dir: str = "",
  approximate: bool = False,
  far: float = 1e-3,
  card: Card | None = None,
) -> None:
  """Shows the images of a gallery that are nearest to a query, or to each.

  The features of the gallery are kept, and brought up to date. An output is a
  .json or an .html. Only if it is approximate, some of the nearest may be
  missed. Which of them show the query's person is said at a false accept rate,
  a strict one by default, as a gallery holds many other people.
  """
  if rerank and approximate:
    raise UserError("--rerank compares all images: leave out --approximate")
  outputs = _outputs(output, (".json", ".html"))
  _folder(gallery, "--gallery")
  encoder = _open(checkpoint, card)
  with _shown():
    if pathlib.Path(query).is_dir():
      queries = _update(query, "--query", encoder, cache_dir)
      paths, features = [queries.path(i) for i in range(len(queries))], queries
    else:
      paths = [expand(query, "--query")]
      features = flat(encoder(paths))
    images = _update(gallery, "--gallery", encoder, cache_dir)
  near = rank_anew if rerank else rank
  near = rank_approximately if approximate else near
  hits = near(features[:], images, top)
  threshold = encoder.card.get("same_person")
  results = [
    {
      "query": str(path),
      "hits": list(_hits(images, rows, similarity, threshold, far)),
    }
    for path, rows, similarity in zip(paths, *hits, strict=True)
  ]
  for result in results:
    _show(result)
  if threshold:
    print(_meaning(threshold, far))
  if rerank:
    print("ranked anew by their neighbours: similarities need not fall")
  for path in outputs:
    with whole_file(path, "--output") as file:
      is_page = path.suffix == ".html"
      shown = results[:_ON_A_PAGE] if is_page else results
      meaning = _meaning(threshold, far) if threshold else ""
      page = _page(shown, meaning) if is_page else None
      text = page or json.dumps(shown, indent=1)
      file.write(text.encode())
    if len(shown) < len(results):
      _say(f"{path} shows the first {len(shown)} of {len(results)} queries")


def verify(
  checkpoint: str,
  query: str,
  gallery: str,
  far: float | None = None,
  card: Card | None = None,
) -> None:
  """Says whether two images show the same person, and how sure that is."""
  one, other = _image(query, "--query"), _image(gallery, "--gallery")
  encoder = _open(checkpoint, card)
  answer = encoder.same(one, other, far)
  same, distance, accepted, rejected = (x.item() for x in answer)
  source = encoder.threshold()["source"]
  print("the same person" if same else "another person")
  print(f"squared distance {distance:.3f}; measured on {source}:")
  print(f"{100 * accepted:.3g} % of the pairs of different people are as near,")
  print(f"{100 * rejected:.3g} % of the pairs of one person are as far")


def export(
  checkpoint: str,
  output: Sequence[str],
  format: str = "torch",
  dtype: str = "float32",
  card: Card | None = None,
) -> None:
  """Writes the encoder for others; see `export`."""
  with sent_to(_say):
    encoder = _open(checkpoint, card)
    for path in output:
      write_encoder(encoder, path, format, dtype)


def _open(checkpoint, card) -> Encoder:
  """The encoder; of a workdir it is said which one."""
  encoder, path = load_encoder(checkpoint, card), expand(checkpoint, "it")
  if path.is_dir() and (last := Workdir(path).newest("last")):
    _say(f"the encoder is {last}")
  return encoder


def _hits(images, rows, similarity, card, far) -> Iterator[dict]:
  """The images found, and if the encoder has a threshold, what it says."""
  for row, cosine in zip(rows, similarity.tolist(), strict=True):
    hit = {"image": str(images.path(row)), "similarity": round(cosine, 5)}
    if card:
      answer = decide(np.array([2 - 2 * cosine]), card, far)
      hit["same_person"] = bool(answer.same[0])
      hit["false_accept_rate"] = round(float(answer.far[0]), 6)
    yield hit


def _meaning(card, far) -> str:
  """What "same" means, and how much of what is the same it finds."""
  limit = np.interp(far, RATES, card["different"])
  found = 1 - float(decide(np.array([limit]), card).frr[0])
  return (
    f'"same": as near as {100 * far:g} % of the pairs of different people, and '
    f"{100 * found:.2g} % of those of one person ({card['source']})"
  )


def _show(result):
  print(result["query"])
  for place, hit in enumerate(result["hits"], 1):
    same = "same" if hit.get("same_person") else ""
    print(f"{place:>5}  {hit['similarity']:.3f}  {same:<5}  {hit['image']}")


def _page(results, meaning) -> str:
  """The ranked lists with their pictures, which stand in the page."""
  rows = []
  for result in results:
    crops = [_crop(result["query"], "query", "")]
    for hit in result["hits"]:
      text = f"similarity {hit['similarity']:.3f}"
      if hit.get("same_person"):
        text += ", same"
      crops.append(_crop(hit["image"], "", text))
    rows.append(Row(result["query"], crops))
  part = report.Part("ranked", "The nearest images", rows={"": rows})
  title = f"Search for {len(rows)} image" + "s" * (len(rows) > 1)
  return report.render(
    "report.html", title=title, subtitle=meaning, parts=[part]
  )


def _crop(path, mark, text):
  pixels = decode(pathlib.Path(path), 160, 80)
  return Crop(picture(pixels), f"{pathlib.Path(path).name} {text}", mark)


def _update(folder, option, encoder, cache_dir) -> Gallery:
  """The features of a folder; what is left out is said."""
  found = update(_folder(folder, option), encoder, cache_dir)
  if found.corrupt:
    _say(
      f"left out: {len(found.corrupt)} file(s) without an image, such as "
      f"{found.folder / found.corrupt[0]}"
    )
  if not len(found):
    raise UserError(f"{option}={folder}: none of its images can be read")
  return found


def _folder(path, option) -> pathlib.Path:
  if not expand(path, option).is_dir():
    raise UserError(f"{option}={path} is no folder: check the path")
  return expand(path, option)


def _image(path, option) -> pathlib.Path:
  if expand(path, option).is_dir():
    raise UserError(f"{option}={path} is a folder: name one image")
  return expand(path, option)


def _outputs(paths, endings) -> list[pathlib.Path]:
  """The files to be written, if they can be; nothing has been done yet."""
  paths = [expand(path, "--output") for path in paths]
  for path in paths:
    if path.suffix not in endings:
      raise UserError(f"--output={path}: end it in {' or '.join(endings)}")
    if not path.parent.is_dir():
      raise UserError(
        f"--output={path}: there is no such folder, make it first"
      )
  return paths


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
