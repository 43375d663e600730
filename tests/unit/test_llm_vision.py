"""Models that see, against their reference: tiny random ones, as transformers reads and computes
them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from cotenant.domain.errors import InvalidRequest, ModelError
from cotenant.engines.llm.blocks import BlockPool
from cotenant.engines.llm.checkpoint import open_checkpoint
from cotenant.engines.llm.generator import Generator, Question
from cotenant.engines.llm.iteration import Iterations, Limits
from cotenant.engines.llm.language import LlmLanguage, text_of
from cotenant.engines.llm.pictures import Opened, read_cutting
from cotenant.engines.llm.runner import Runner, Sizes
from cotenant.engines.llm.sampler import Sampling
from cotenant.engines.llm.sight import open_sight
from cotenant.engines.llm.vision_graph import VisionRunner
from cotenant.engines.llm.weights import Build
from tests.unit.vlm_files import IMAGE, encoded, picture, write_vlm

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GREEDY = Sampling(temperature=0, seed=0)
MEMORY = Sizes(blocks=96, size=8, host=8, context=512)
MODELS: dict[str, dict[str, Any]] = {
    "idefics3": {},
    "smolvlm": {"model_type": "smolvlm"},
    "rows of nine patches": {"tower": {"patch_size": 4, "image_size": 27}, "shuffle": 3},
    "one tile an image": {"images": {"do_image_splitting": False}},
}
MODELS["rows of nine patches"]["images"] = {
    "max_image_size": {"longest_edge": 27},
    "size": {"longest_edge": 54},
}


@pytest.fixture(params=MODELS, scope="module")
def path(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Path:
    return write_vlm(tmp_path_factory.mktemp("model"), **MODELS[request.param])


@pytest.fixture(scope="module")
def reference(path: Path) -> Any:
    found = transformers.AutoModelForImageTextToText.from_pretrained(
        path.parent, attn_implementation="eager"
    )
    return found.eval()


@pytest.fixture(scope="module")
def processor(path: Path) -> Any:
    return processor_of(path.parent)


def processor_of(folder: Path) -> Any:
    """Of Pillow, as ours; and with the number of rows that the model has."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    images = Idefics3ImageProcessorPil.from_pretrained(folder)
    checkpoint = open_checkpoint(folder / "model.safetensors")
    assert checkpoint.vision is not None
    return transformers.Idefics3Processor(images, tokenizer, image_seq_len=checkpoint.vision.rows)


def opened(path: Path, data: bytes) -> Opened:
    vision = open_checkpoint(path).vision
    assert vision is not None
    return Opened(data, read_cutting(path.parent, vision), vision)


def tiles(path: Path, data: bytes) -> np.ndarray[Any, Any]:
    image = opened(path, data)
    return np.frombuffer(image.pixels(), np.uint8).reshape(image.shape)


# --- the tower ----------------------------------------------------------------------------------


@pytest.mark.parametrize("across", [1, 2, 4, 7, 14, 16, 24, 26, 27, 28, 32, 37, 64])
def test_the_references_positions_are_in_order(across: int) -> None:
    from transformers.models.idefics3.modeling_idefics3 import (
        Idefics3VisionConfig,
        Idefics3VisionEmbeddings,
    )

    config = Idefics3VisionConfig(hidden_size=1, image_size=across, patch_size=1)
    embeddings = Idefics3VisionEmbeddings(config)
    with torch.no_grad():
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight.copy_(torch.arange(across**2)[:, None])
        mask = torch.ones(1, across, across, dtype=torch.bool)
        right = embeddings(torch.zeros(1, 3, across, across), mask)[0, :, 0].numpy()
    assert right.tolist() == list(range(across**2)), "row by row, as in our graph"


def test_a_tile_becomes_the_references_rows(path: Path, reference: Any) -> None:
    checkpoint = open_checkpoint(path)
    runner = VisionRunner(checkpoint, (1,))
    pixels = np.random.default_rng(2).normal(0, 1, (runner.vision.side,) * 2 + (3,))
    pixels = pixels.astype(np.float32)
    given = torch.from_numpy(pixels.transpose(2, 0, 1)[None, None])
    with torch.no_grad():
        right = reference.model.get_image_features(given).pooler_output[0].numpy()
    found = runner.encode(1, pixels)
    assert found.shape == (runner.vision.rows, checkpoint.decoder.hidden)
    np.testing.assert_allclose(found, right, atol=2e-4, rtol=2e-4)


# --- images -------------------------------------------------------------------------------------

SIZES = [(1, 1), (28, 28), (29, 28), (64, 64), (90, 40), (31, 100), (640, 481), (200, 3), (2, 300)]


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_those_of_the_reference(path: Path, processor: Any, size: Any) -> None:
    image = picture(*size)
    right = processor.image_processor(image, return_row_col_info=True)
    data = encoded(image)
    grid = opened(path, data).grid
    assert (grid.rows, grid.columns) == (right["rows"][0][0], right["cols"][0][0])
    cutting = read_cutting(path.parent, open_checkpoint(path).vision)  # type: ignore[arg-type]
    found = np.stack([cutting.normalized(tile) for tile in tiles(path, data)])
    np.testing.assert_allclose(
        found.transpose(0, 3, 1, 2), np.asarray(right["pixel_values"])[0], atol=1e-5
    )


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "CMYK"])
def test_colours_are_those_of_the_reference(tmp_path: Path, mode: str) -> None:
    path = write_vlm(tmp_path)
    image = (
        picture(50, 30, mode="RGB").convert(mode) if mode != "RGBA" else picture(50, 30, 1, mode)
    )
    kind = "JPEG" if mode == "CMYK" else "PNG"
    data = encoded(image, kind)
    right = processor_of(tmp_path).image_processor(Image.open(BytesIO(data)))
    cutting = read_cutting(tmp_path, open_checkpoint(path).vision)  # type: ignore[arg-type]
    found = np.stack([cutting.normalized(tile) for tile in tiles(path, data)])
    np.testing.assert_allclose(
        found.transpose(0, 3, 1, 2), np.asarray(right["pixel_values"])[0], atol=1e-5
    )


@pytest.mark.parametrize("held", range(1, 9))
def test_a_photo_is_turned_as_the_camera_was_held(tmp_path: Path, held: int) -> None:
    path = write_vlm(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = held
    turned = encoded(picture(56, 28), "JPEG", exif=exif, quality=100)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(turned)))
    assert opened(path, turned).grid == opened(path, encoded(upright)).grid
    np.testing.assert_array_equal(tiles(path, turned), tiles(path, encoded(upright)))


def bomb() -> bytes:
    """A file of a few bytes that says that it is 30,000 pixels wide and high."""
    data = bytearray(encoded(Image.new("RGB", (8, 8))))
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no image at all",
        encoded(picture(8, 8), "GIF"),
        encoded(picture(8, 8), "BMP"),
        encoded(picture(8, 8))[:20],
        encoded(picture(8, 8), "JPEG")[:30],
        bomb(),
        encoded(picture(8, 8), "JPEG") + b"\xff\xda" * 101,
        encoded(Image.new("L", (4097, 4096))),
        encoded(picture(8, 8)) + bytes(4 << 20),
    ],
    ids=["none", "text", "gif", "bmp", "cut png", "cut jpeg", "bomb", "scans", "pixels", "bytes"],
)
def test_what_is_no_image_is_refused_before_it_is_decoded(tmp_path: Path, data: bytes) -> None:
    path = write_vlm(tmp_path)
    with pytest.raises(InvalidRequest):
        opened(path, data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_what_is_damaged_is_refused(tmp_path: Path, kind: str) -> None:
    path = write_vlm(tmp_path)
    data = encoded(picture(300, 300), kind)
    with pytest.raises(InvalidRequest):
        opened(path, data[: len(data) * 3 // 4]).pixels()


@pytest.mark.parametrize(
    "given",
    [
        {"images": {"max_image_size": {"longest_edge": 56}}},
        {"images": {"do_normalize": False}},
        {"images": {"image_std": [0, 1, 1]}},
        {"images": {"image_mean": [0.5]}},
        {"images": {"size": {"height": 3, "width": 3}}},
        {"images": {"resample": 99}},
    ],
)
def test_what_is_not_served_is_refused_by_name(tmp_path: Path, given: dict[str, Any]) -> None:
    path = write_vlm(tmp_path, **given)
    with pytest.raises(ModelError, match=next(iter(given["images"]))):
        LlmLanguage(path)


def test_a_processor_config_says_the_same(tmp_path: Path) -> None:
    path = write_vlm(tmp_path)
    vision = open_checkpoint(path).vision
    assert vision is not None
    before = read_cutting(tmp_path, vision)
    given = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError):
        read_cutting(tmp_path, vision)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": given}))
    assert read_cutting(tmp_path, vision) == before


# --- prompts ------------------------------------------------------------------------------------


def asked(path: Path, images: Sequence[bytes], text: str = "what is it?") -> tuple[Any, Any, Any]:
    """Messages as they are given, the tokens of the prompt, and its tiles."""
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": content}]
    language = LlmLanguage(path)
    pictures = [language.picture(data) for data in images]
    tokens = language.prompt(messages, None, 512, pictures)
    return messages, tuple(tokens), tuple(t for data in images for t in tiles(path, data))


def in_reference(processor: Any, images: Sequence[bytes], messages: Any) -> Any:
    parts = [{"type": "text", "text": messages[0]["content"]}]
    messages = [{"role": "system", "content": parts}, messages[1]]
    template = processor.tokenizer.chat_template
    text = processor.tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    opened = [Image.open(BytesIO(data)).convert("RGB") for data in images]
    return processor(text=text, images=opened, add_special_tokens=False, return_tensors="pt")


IMAGES = [encoded(picture(90, 60)), encoded(picture(30, 80, seed=2), "JPEG")]


@pytest.mark.parametrize("images", [IMAGES[:1], IMAGES], ids=["one", "two"])
def test_prompts_are_those_of_the_reference(
    path: Path, processor: Any, images: list[bytes]
) -> None:
    messages, tokens, _ = asked(path, images)
    right = in_reference(processor, images, messages)
    assert list(tokens) == right["input_ids"][0].tolist()


def test_image_tokens_that_no_image_stands_for_are_refused(path: Path) -> None:
    with pytest.raises(InvalidRequest):
        asked(path, IMAGES[:1], text="<image>")


# --- answers ------------------------------------------------------------------------------------


class Answers:
    """A model at work."""

    def __init__(
        self, path: Path, blocks: int = 96, tokens: int = 512, build: Build | None = None
    ) -> None:
        checkpoint = open_checkpoint(path)
        self.runner = Runner(checkpoint, build or Build(), MEMORY, (1,))
        self.core = Iterations(BlockPool(blocks, 8), Limits(tokens=tokens))
        sight = open_sight(checkpoint, path.parent, (1,))
        assert sight is not None
        self.sight = sight
        self.model = Generator(text_of(checkpoint, path), self.runner, self.core, None, sight)
        self.said: dict[int, list[int]] = {}
        self.cached: dict[int, int] = {}

    def ask(self, key: int, prompt: Any, tiles: Any, **how: Any) -> None:
        how = {"most": 12, "endless": True} | how
        self.model.begin(key, Question(prompt=prompt, sampling=GREEDY, tiles=tiles, **how))
        self.said[key] = []

    def step(self, within: int | None = None) -> None:
        for piece in self.model.step(1, within):
            assert not piece.error
            self.said[piece.key] += [choice.token for choice in piece.choices]
            self.cached[piece.key] = piece.cached
        self.core.check()

    def finish(self, within: int | None = None) -> dict[int, list[int]]:
        for _ in range(500):
            if not self.core.running + self.core.waiting:
                return self.said
            self.step(within)
        raise AssertionError("it does not end")


def right_answer(reference: Any, processor: Any, images: list[bytes], messages: Any) -> list[int]:
    inputs = in_reference(processor, images, messages)
    with torch.no_grad():
        said = reference.generate(
            **inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
        )
    return list(said[0, inputs["input_ids"].shape[1] :].tolist())


def test_answers_are_those_of_the_reference(path: Path, reference: Any, processor: Any) -> None:
    right = {}
    model = Answers(path)
    for key, images in enumerate((IMAGES[:1], IMAGES[1:], IMAGES)):
        messages, tokens, cut = asked(path, images)
        right[key] = right_answer(reference, processor, images, messages)
        model.ask(key, tokens, cut)
    assert model.finish() == right
    assert len({tuple(said) for said in right.values()}) > 1, "images make a difference"
    assert not model.sight.images, "what nobody has is not kept"


@pytest.mark.parametrize(("bits", "apart"), [(32, 5e-4), (8, 0.05), (4, 0.5)])
def test_logits_are_the_references(
    path: Path, reference: Any, processor: Any, bits: Any, apart: float
) -> None:
    """The tower is FP32, whatever the decoder's weights are."""
    messages, tokens, cut = asked(path, IMAGES)
    with torch.no_grad():
        right = reference(**in_reference(processor, IMAGES, messages)).logits[0, -1].numpy()
    model = Answers(path, build=Build(bits=bits))
    model.ask(1, tokens, cut)
    logits = {}
    compute = model.runner.compute

    def seen(*given: Any) -> Any:
        found = compute(*given)
        logits.update({key: each.logits for key, each in found.items()})
        return found

    model.runner.compute = seen  # type: ignore[method-assign]
    while model.core.find(1).said < 1:  # type: ignore[union-attr]
        model.step()
    assert np.abs(logits[1][-1] - right).mean() < apart * np.abs(right).mean()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: Any) -> Path:
    return write_vlm(tmp_path_factory.mktemp("plain"))


def alone(path: Path, images: list[bytes], **how: Any) -> list[int]:
    model = Answers(path)
    _, tokens, cut = asked(path, images)
    model.ask(1, tokens, cut, **how)
    return model.finish()[1]


def test_short_iterations_encode_a_tile_each_and_change_nothing(plain: Path) -> None:
    model = Answers(plain, tokens=16)
    for key, images in enumerate((IMAGES, IMAGES[:1])):
        _, tokens, cut = asked(plain, images)
        model.ask(key, tokens, cut)
    most = 0
    for _ in range(300):
        before = len(model.sight.images)
        model.step(within=1)
        most = max(most, len(model.sight.images) - before)
        if not model.core.running + model.core.waiting:
            break
    assert most == 1
    assert model.said == {0: alone(plain, IMAGES), 1: alone(plain, IMAGES[:1])}


def test_the_same_image_is_not_read_twice_and_another_is(plain: Path) -> None:
    model = Answers(plain)
    _, tokens, cut = asked(plain, IMAGES[:1])
    other = encoded(picture(90, 60, seed=9))
    _, same, different = asked(plain, [other])
    assert tokens == same, "the prompts differ in their pixels alone"
    model.ask(1, tokens, cut)
    model.finish()
    model.ask(2, tokens, cut)
    model.ask(3, tokens, different)
    said = model.finish()
    assert said[2] == said[1]
    assert said[3] == alone(plain, [other])
    assert model.cached[2] > len(tokens) // 2
    assert model.cached[3] < tokens.index(IMAGE) + 1


def test_who_is_put_aside_reads_its_image_again_without_encoding_it(plain: Path) -> None:
    model = Answers(plain, blocks=28)
    encodings = []
    encode = model.sight.encode
    model.sight.encode = lambda units, tile: (  # type: ignore[method-assign]
        encodings.append(tile) or encode(units, tile)
    )
    for key, seed in enumerate((3, 4, 5)):
        image = [encoded(picture(28, 28, seed=seed))]
        _, tokens, cut = asked(plain, image)
        model.ask(key, tokens, cut, most=40)
    said = model.finish()
    assert model.core.put_aside > 0
    assert len(encodings) == len(set(encodings)), "each tile once"
    for key, seed in enumerate((3, 4, 5)):
        assert said[key] == alone(plain, [encoded(picture(28, 28, seed=seed))], most=40)


def test_who_leaves_takes_its_tiles_along(plain: Path) -> None:
    model = Answers(plain)
    _, tokens, cut = asked(plain, IMAGES)
    model.ask(1, tokens, cut)
    model.step(within=1)
    assert model.sight.images
    model.model.forget([1])
    assert not model.sight.images
    assert not model.core.tiles.held


def test_a_turn_that_only_encodes_has_work(plain: Path) -> None:
    model = Answers(plain)
    _, _, cut = asked(plain, IMAGES[:1])
    model.core.tiles.took(1000)
    model.ask(1, (IMAGE,) * 4, cut[:1])
    model.step(within=1)
    assert model.core.tiles.encoded
    assert model.core.find(1).computed == 0  # type: ignore[union-attr]
    assert model.model.work.tokens > 0


def test_tiles_that_the_prompt_has_no_tokens_for_are_refused(plain: Path) -> None:
    model = Answers(plain)
    _, tokens, cut = asked(plain, IMAGES[:1])
    with pytest.raises(InvalidRequest):
        model.ask(1, tokens, cut[:-1])
    assert not model.core.tiles.held


def test_text_alone_is_answered_as_ever(plain: Path) -> None:
    language = LlmLanguage(plain)
    tokens = tuple(language.prompt([{"role": "user", "content": "hello"}], None, 512))
    assert b"hello" in b"".join(map(language.piece, tokens))
    model = Answers(plain)
    model.ask(1, tokens, ())
    assert len(model.finish()[1]) == 12
