"""A model package of ONNX Runtime: bundles for several execution providers, over shared assets.

``manifest.json`` is ONNX Runtime's. A variant is a bundle for one provider; what bundles may have
in common lies in folders that are named by a hash of their content::

    DIR/
      manifest.json                    components, variants, where each one's assets are
      NAME/                            a variant: graphs, golden cases, lora_edge.json
      shared_assets/sha256-HASH/       weights; an adapter; the tokenizer and the base's other files

Weights of one bundle may be the beginning of another's: the portable graph's are the fused one's
without the rotary tables. Then the longer file is there for both.

Source of the format: onnxruntime 1.32, ``model_package/README.md``. Knows files; knows nothing of
sessions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from lora_edge.bundle.bundle import Bundle
from lora_edge.bundle.clients import GENAI_FILE
from lora_edge.bundle.manifest import MANIFEST_NAME, Manifest
from lora_edge.bundle.part import Part
from lora_edge.errors import BundleError
from lora_edge.files.hashes import hash_file
from lora_edge.files.json import read_bytes, read_object
from lora_edge.files.paths import path_inside
from lora_edge.files.placing import place
from lora_edge.files.schema import Rule, Sha256, decode
from lora_edge.targets.providers import provider

PACKAGE_FILE = "manifest.json"
SHARED_FOLDER = "shared_assets"
SCHEMA_VERSION = "1.0"
NAMESPACE = "lora_edge"
"""What is ours in a variant's ``executor_info``."""
GRAPHS = "onnx"
"""The folder of a bundle with graphs and weights."""
ROOT = "."
"""The bundle's own folder, among the folders that are assets."""

# What differs from bundle to bundle of one base.
_OWN_FILES = {"README.md", "config.json", GENAI_FILE}
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_HINT = "Copy the whole package again, or make it again with lora-edge package."
_URI = re.compile(r"sha256:([0-9a-f]{64})")
AssetUri = Annotated[str, Rule("sha256: and 64 digits", lambda x: bool(_URI.fullmatch(x)))]


@dataclass(frozen=True)
class VariantInfo:
    """What is said of a variant in ``executor_info.lora_edge``.

    Attributes:
        manifest: sha256 of the variant's ``lora_edge.json``.
        assets: folder of the bundle -> URI of the asset that has its files; ``.``: the bundle's.
        adapters: name -> URI of its ``.onnx_adapter`` file; without those of merged bundles.
    """

    manifest: Sha256
    assets: Mapping[str, AssetUri]
    adapters: Mapping[str, str]


@dataclass(frozen=True)
class Variant:
    """A bundle in a package.

    Attributes:
        name: of the variant: the short name of its execution provider.
        folder: what is its own.
        info: where the rest is.
        package: the package's folder.
        told: component -> what the package's manifest says of the variant there.
    """

    name: str
    folder: Path
    info: VariantInfo
    package: Path
    told: Mapping[str, Mapping[str, Any]]

    def manifest(self) -> Manifest:
        """The bundle's manifest.

        Raises:
            BundleError: it is missing or damaged.
        """
        path = self.folder / MANIFEST_NAME
        data = read_bytes(path, BundleError, _HINT)
        if hashlib.sha256(data).hexdigest() != self.info.manifest:
            raise BundleError(f"{path} differs from its hash in {PACKAGE_FILE}", _HINT)
        return Manifest.from_json(data, str(path))

    def place_of(self, relative: str) -> Path:
        """Where a file of the bundle lies in the package."""
        for folder in PurePosixPath(relative).parents:
            uri = self.info.assets.get(folder.as_posix())
            if uri is not None:
                rest = PurePosixPath(relative).relative_to(folder).as_posix()
                shared = asset_folder(self.package, uri) / rest
                if shared.is_file():
                    return shared
        return self.folder / relative

    def check(self) -> None:
        """Compare every file of the bundle with its hash, and what ONNX Runtime is told of it.

        Raises:
            BundleError: a file is missing, changed, or lies outside; or ONNX Runtime would open
                another graph, on other weights or another provider.
        """
        manifest = self.manifest()
        own = dataclasses.replace(self.info, adapters=adapter_uris(manifest, self.info.assets))
        made = {part: variant_body(self.name, x, own) for part, x in manifest.parts.items()}
        for part in sorted(made.keys() | self.told.keys()):
            if self.told.get(part) != made.get(part):
                raise BundleError(
                    f"{self.package / PACKAGE_FILE}: what it says of {part}, {self.name} is not "
                    "what lora-edge writes",
                    _HINT,
                )
        for relative, entry in manifest.files.items():
            path = self.place_of(relative)
            inside = path.relative_to(self.package).as_posix()
            path_inside(self.package, inside, f"{self.name}: a file", BundleError, _HINT)
            if not path.is_file():
                raise BundleError(f"{self.package}: {inside} is missing ({self.name})", _HINT)
            longer = path.stat().st_size > entry.bytes and path.is_relative_to(self.folder)
            if longer or hash_file(path, entry.bytes) != entry.sha256:
                raise BundleError(
                    f"{self.package}: {inside} differs from its hash in the {MANIFEST_NAME} of "
                    f"{self.name}",
                    _HINT,
                )

    def unpack(self, target: Path, *, link: bool = False) -> Bundle:
        """Put the bundle together, in an empty folder.

        Args:
            target: the folder.
            link: by hard links, where the file system can do that.

        Raises:
            BundleError: a file is missing or damaged.
        """
        self.check()
        manifest = self.manifest()
        for relative, entry in manifest.files.items():
            place(self.place_of(relative), target / relative, link=link, size=entry.bytes)
        place(self.folder / MANIFEST_NAME, target / MANIFEST_NAME, link=False)
        return Bundle(target, manifest)


@dataclass(frozen=True)
class Package:
    """A package on disk.

    Attributes:
        directory: its folder.
        variants: name -> variant.
    """

    directory: Path
    variants: Mapping[str, Variant]

    def check(self) -> None:
        """Compare every file and every shared asset with its hash; ONNX Runtime does not.

        Raises:
            BundleError: names what is missing or was changed, or a file that no one knows.
        """
        for variant in self.variants.values():
            variant.check()
        for uri in sorted({uri for x in self.variants.values() for uri in x.info.assets.values()}):
            folder = asset_folder(self.directory, uri)
            if not folder.is_dir():
                raise BundleError(f"{folder} is missing", _HINT)
            if (found := directory_uri(folder)) != uri:
                raise BundleError(
                    f"{folder} holds {found}, expected {uri}: a file was changed, added or renamed",
                    _HINT,
                )


def is_package(directory: str | os.PathLike[str]) -> bool:
    """Whether a folder is a package, and no bundle."""
    root = Path(directory)
    if not (root / PACKAGE_FILE).is_file() or (root / MANIFEST_NAME).is_file():
        return False
    try:
        return "components" in read_object(root / PACKAGE_FILE, BundleError, _HINT)
    except BundleError:  # another program's file of that name
        return False


def load_package(directory: str | os.PathLike[str]) -> Package:
    """Open a package that :mod:`lora_edge.exporting.package` has written; reads its manifest only.

    Raises:
        BundleError: it is none, or its manifest is damaged.
    """
    root = Path(directory)
    path = root / PACKAGE_FILE
    if not path.is_file():
        raise BundleError(
            f"{root} is no model package: it has no {PACKAGE_FILE}",
            "Make one with: lora-edge package BUNDLE -o DIR",
        )
    data = read_object(path, BundleError, _HINT)
    variants: dict[str, Variant] = {}
    for component, name, body in _bodies(data, path):
        told = body.get("executor_info")
        ours = told.get(NAMESPACE) if isinstance(told, dict) else None
        if not isinstance(ours, dict):
            raise BundleError(f"{path}: the variant {name!r} is none of lora-edge's", _HINT)
        info = decode(VariantInfo, ours, f"{path}: {name}", BundleError, _HINT)
        folder = path_inside(root, name, f"{path}: a variant", BundleError, _HINT)
        told_before = variants[name].told if name in variants else {}
        variants[name] = Variant(name, folder, info, root, {**told_before, component: body})
    if not variants:
        raise BundleError(f"{path} has no variants", _HINT)
    return Package(root, variants)


def _bodies(data: Mapping[str, Any], path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Component, name and content of each variant."""
    components = data.get("components")
    for key, component in components.items() if isinstance(components, dict) else ():
        variants = component.get("variants") if isinstance(component, dict) else None
        if not isinstance(variants, dict) or not all(
            isinstance(x, dict) for x in variants.values()
        ):
            raise BundleError(f"{path}: a component has no variants in it", _HINT)
        yield from ((key, name, body) for name, body in variants.items())


def asset_of(relative: str) -> tuple[str, str] | None:
    """The folder whose asset has a file, and its path there; None: it is the variant's own."""
    folder, _, rest = relative.partition("/")
    if folder == "adapters":
        name, _, rest = rest.partition("/")
        return f"{folder}/{name}", rest
    if folder == GRAPHS:
        return (folder, rest) if not rest.endswith(".onnx") else None
    if folder == "parity" or relative in _OWN_FILES:
        return None
    return ROOT, relative


def adapter_uris(manifest: Manifest, assets: Mapping[str, str]) -> dict[str, str]:
    """Where the adapters' files are that a bundle's graph takes, by name."""
    found = {}
    for name, entry in manifest.adapters.items():
        folder, path = asset_of(entry.half or entry.file) or ("", "")
        if path and folder in assets:
            found[name] = f"{assets[folder]}/{path}"
    return found


def variant_body(name: str, part: Part, info: VariantInfo) -> dict[str, Any]:
    """What a package's manifest says of a variant in the component of a part."""
    known = provider(name)
    options = {_DATA_FOLDER: info.assets[GRAPHS]} if GRAPHS in info.assets else {}
    return {
        "variant_directory": name,
        "ep": known.ort_name if known else name,
        "executor_info": {
            "ort": {"model_file": part.file, "session_options": options},
            NAMESPACE: dataclasses.asdict(info),
        },
    }


def asset_folder(package: Path, uri: str) -> Path:
    """Where a shared asset lies."""
    return package / SHARED_FOLDER / uri.replace(":", "-")


def directory_uri(folder: Path) -> str:
    """The URI of a folder's content, as ``ModelPackage.compute_directory_hash`` gives it.

    Raises:
        BundleError: it holds a link.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    for path in files:
        if path.is_symlink():
            raise BundleError(f"{path} is a link, which no package has", _HINT)
    return content_uri((x.relative_to(folder).as_posix(), hash_file(x)) for x in files)


def content_uri(files: Iterable[tuple[str, str]]) -> str:
    """The URI of files: (path in their folder, sha256) of each."""
    lines = sorted((name.encode(), digest) for name, digest in files)
    text = b"".join(digest.encode() + b"  " + name + b"\n" for name, digest in lines)
    return f"sha256:{hashlib.sha256(text).hexdigest()}"
