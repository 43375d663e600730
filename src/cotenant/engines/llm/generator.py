"""Answers questions: joins the core, which decides, the runner, which computes, and the text.

``begin`` takes a question up, each ``step`` is one iteration for all of them, ``forget`` is for
those that nobody waits for any more. One thread calls it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec
import numpy as np

from cotenant.domain.errors import InvalidRequest, TooLarge
from cotenant.engines.llm.asking import Spec
from cotenant.engines.llm.drafter import Drafter
from cotenant.engines.llm.families.base import Floats
from cotenant.engines.llm.grammar import Grammar, Grammars
from cotenant.engines.llm.iteration import Iterations, Said
from cotenant.engines.llm.pictures import Pixels
from cotenant.engines.llm.plan import Work
from cotenant.engines.llm.runner import Runner
from cotenant.engines.llm.sampler import Choice, Sampling, choose
from cotenant.engines.llm.sequence import End, Sequence
from cotenant.engines.llm.sight import Sight
from cotenant.engines.llm.stops import Stops
from cotenant.engines.llm.text import Text
from cotenant.policy.iterations import Load

MOST_ALIKE: Final = 1 << 20
"""Tokens that a tile counts as."""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """``prompt``: its tokens. ``tiles``: those of its images, each [side, side, 3]; the prompt has
    tokens for them. ``most``: so many tokens may be said. ``stops``: strings that end the answer.
    ``endless``: tokens that end answers do not end this one. ``embed``: what the model makes of the
    prompt is wanted, no answer. ``due``, ``pace`` and ``salt`` are those of a ``Sequence``."""

    prompt: tuple[int, ...]
    most: int
    sampling: Sampling
    tiles: tuple[Pixels, ...] = ()
    stops: tuple[str, ...] = ()
    grammar: Spec | None = None
    endless: bool = False
    embed: bool = False
    due: int = 0
    pace: int = 0
    salt: str = ""


class Piece(NamedTuple):
    """What an answer goes on with: ``choices`` token by token, and the text that is certain by now.
    ``end``: why it is over, if it is; ``error``: what went wrong, and then it is over too.
    ``cached``: tokens of the prompt that had been computed before. ``embedding``: see
    ``asking.Details``."""

    key: int
    text: str
    choices: tuple[Choice, ...]
    end: End | None
    error: str = ""
    cached: int = 0
    embedding: Floats | None = None

    @property
    def over(self) -> bool:
        """Whether nothing follows."""
        return self.end is not None or bool(self.error)


class Generator:
    """See the module's text. ``drafter``: where the core has a draft model; ``sight``: where the
    model sees images."""

    def __init__(
        self,
        text: Text,
        runner: Runner,
        core: Iterations,
        drafter: Drafter | None = None,
        sight: Sight | None = None,
    ) -> None:
        self.text = text
        self.runner = runner
        self.core = core
        self.drafter = drafter
        self.sight = sight
        self.work = Load()
        """What the last iteration had to do. A tile counts as many tokens as take as long."""
        self._grammars: Grammars | None = None
        self._answers: dict[int, _Answer] = {}

    def begin(self, key: int, question: Question) -> None:
        """Take a question up. Raises InvalidRequest, and TooLarge if the prompt and the answer are
        longer than a sequence may be; then nothing is kept."""
        problem = question.sampling.problem()
        if problem:
            raise InvalidRequest(problem)
        if not question.prompt or question.most < 1:
            raise InvalidRequest(
                "a prompt has at least one token, and an answer may have at least one"
            )
        strange = [token for token in question.prompt if not 0 <= token < self.text.vocabulary]
        if strange:
            raise InvalidRequest(
                f"token {strange[0]} of the prompt is not from 0 to {self.text.vocabulary - 1}"
            )
        context = self.runner.memory.context
        if len(question.prompt) + question.most > context:
            raise TooLarge(
                f"{len(question.prompt)} tokens of the prompt and up to {question.most} of the "
                f"answer are more than {context}"
            )
        tokens, tiles = question.prompt, dict[int, Pixels]()
        if self.sight is not None:
            tokens, tiles = self.sight.placed(question.prompt, question.tiles)
        answer = _Answer(question, self.text, self._compile(question.grammar))
        ends = frozenset[int]() if question.endless else self.text.ends
        # Of blocks that are there already nothing is computed that could be pooled.
        salt = f"embed {key}" if question.embed else question.salt
        sequence = Sequence(
            key,
            tokens,
            1 if question.embed else question.most,
            stops=ends,
            due=question.due,
            pace=question.pace,
            salt=salt,
        )
        self.core.add(sequence)
        self._answers[key] = answer
        if self.sight is not None:
            self.sight.keep(tiles)

    def _compile(self, spec: Spec | None) -> Grammar | None:
        if spec is None:
            return None
        self._grammars = self._grammars or Grammars(self.text)
        return self._grammars.compile(spec)

    def step(self, units: int, within: int | None = None) -> list[Piece]:
        """One iteration on so many threads, of about ``within`` ns; what came of it. An answer that
        is over is forgotten. Raises ModelError if the engine fails; then all is as before but for
        the time that is lost."""
        iteration = self.core.next(within)
        self.work = iteration.load
        offload_ns, restore_ns = self.runner.move(iteration.moves)
        if self.drafter is not None and iteration.asks:
            iteration = iteration.drafted(self.drafter.propose(units, iteration.asks))
        tile_ns = self._encode(units, iteration.tile)
        began = time.monotonic_ns()
        images = self.sight.images if self.sight is not None else None
        computed = self.runner.compute(units, iteration.works, images)
        took = time.monotonic_ns() - began
        self.core.took(iteration, took, offload_ns, restore_ns, tile_ns)
        chosen, failed = {}, []
        for work in iteration.works:
            answer = self._answers.get(work.key)
            if answer is None:
                continue
            answer.read(work, computed[work.key].hidden)
            if not work.sampled:
                continue
            logits = computed[work.key].logits[:, : self.text.vocabulary]
            try:
                chosen[work.key] = answer.pick(work, logits)
            except (InvalidRequest, ValueError) as error:  # a grammar that is too complex, or stuck
                failed.append(Piece(work.key, "", (), None, str(error)))
                self.forget((work.key,))
        tokens = {key: [choice.token for choice in choices] for key, choices in chosen.items()}
        for key in chosen:
            sequence = self.core.find(key)
            assert sequence is not None
            self._answers[key].cached = sequence.known or 0
        said = self.core.done(iteration, tokens)
        return failed + [self._piece(each, chosen[each.key]) for each in said]

    def warm(self, units: int) -> None:
        """Measure what a tile takes on so many threads. Raises ModelError."""
        if self.sight is not None:
            began = time.monotonic_ns()
            self.sight.try_out(units)
            self.core.tiles.took(time.monotonic_ns() - began)

    def _encode(self, units: int, tile: int | None) -> int:
        """How long (ns) it took."""
        if self.sight is None or tile is None:
            return 0
        began = time.monotonic_ns()
        self.sight.encode(units, tile)
        took, token = time.monotonic_ns() - began, self.core.costs.token
        patches = self.sight.vision.across**2
        alike = round(took / token) if self.core.costs.told and token > 0 else patches
        self.work += Load(max(1, min(alike, MOST_ALIKE)))
        return took

    def _piece(self, said: Said, choices: list[Choice]) -> Piece:
        answer = self._answers[said.key]
        try:
            piece = answer.say(said, choices[: len(said.tokens)])
        except InvalidRequest as error:  # its grammar has become too complex
            piece = Piece(said.key, "", (), None, str(error))
        if piece.over:
            self.forget((said.key,))
        return piece

    def resize(self, blocks: int) -> None:
        """Have so many blocks; what nobody uses goes at once, the rest with the next step."""
        pool = self.core.pool
        pool.resize(min(blocks, pool.most))
        self.runner.move(pool.moves())
        if self.drafter is not None:
            self.drafter.resize(pool.target)

    def forget(self, keys: Iterable[int]) -> None:
        """Nobody waits for these any more. Unknown ones are passed over."""
        for key in keys:
            self._answers.pop(key, None)
            self.core.end(key)
        if self.sight is not None:
            self.sight.forget(self.core.tiles.held)


class _Answer:
    """What was said to one question."""

    def __init__(self, question: Question, text: Text, grammar: Grammar | None) -> None:
        self._question = question
        self._ends = text.ends
        self._grammar = grammar
        self._prompt = np.unique(np.array(question.prompt, np.int64))
        self._said: Counter[int] = Counter()
        self._decoder = text.stream(continued=True)
        self._stops = Stops(question.stops)
        self._pooled = 0
        self._sum: Floats | None = None
        self.cached = 0

    def read(self, work: Work, hidden: Floats) -> None:
        """Take up what the last layer makes of tokens [tokens, hidden], each of them once."""
        new = hidden[max(0, self._pooled - work.start) :]
        if self._question.embed and len(new):
            total = new.sum(axis=0)
            self._sum = total if self._sum is None else self._sum + total
            self._pooled = work.start + len(work.tokens)

    def _embedding(self) -> Floats:
        assert self._sum is not None
        length = float(np.linalg.norm(self._sum))
        return self._sum / (length or 1.0)

    def pick(self, work: Work, logits: Floats) -> list[Choice]:
        """The tokens behind the sampled ones, as long as drafts are what would be said. Raises
        ValueError if none may be said, InvalidRequest if the grammar is too complex."""
        drafts, how = work.drafts, self._question.sampling
        said, grammar = self._said, self._grammar
        if drafts:
            said, grammar = said.copy(), grammar and grammar.copy()
        first = work.start + len(work.tokens) - work.sampled + 1
        found: list[Choice] = []
        for index, row in enumerate(logits):
            allowed = grammar.allowed() if grammar else None
            found.append(choose(row, how, first + index, said, self._prompt, allowed))
            token = found[-1].token
            if index == len(drafts) or token != drafts[index]:
                break
            said[token] += 1
            if grammar:
                grammar.advance(token)
        return found

    def say(self, said: Said, choices: list[Choice]) -> Piece:
        """Take up what the core took up of it."""
        if self._question.embed:
            return Piece(said.key, "", (), said.end, embedding=self._embedding())
        text, end = "", said.end
        for index, token in enumerate(said.tokens):
            self._said[token] += 1
            if self._grammar:
                self._grammar.advance(token)
            if token in self._ends and not self._question.endless:
                continue
            text += self._stops.feed(self._decoder.feed(token))
            if self._stops.stopped:
                choices, end = choices[: index + 1], End.STOP
                return Piece(said.key, text, tuple(choices), end, cached=self.cached)
        if end is not None:
            text += self._stops.feed(self._decoder.finish())
            text += self._stops.finish()
            end = End.STOP if self._stops.stopped else end
        return Piece(said.key, text, tuple(choices), end, cached=self.cached)
