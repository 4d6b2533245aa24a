"""Checks of an architecture contract: what it says is complete, consistent, used, and runs.

::

    class TestPhi3(ContractSuite):
        contract = parse_contract(TEXT, "phi3.toml")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve
from numpy.typing import NDArray

from mortice.arch_contracts.schema import Contract, Role
from mortice.core.config import ExecutorConfig, ModelConfig, RunConfig
from mortice.core.model.hyperparameters import resolve_hyperparameters
from mortice.core.model.operators import Operator
from mortice.core.model.program import build_program
from mortice.core.model.qtypes import GGML_TYPES
from mortice.core.model.types import ModelFile, TensorView
from mortice.core.model.validation import validate
from mortice.core.pipeline import prepare, prepare_opened
from mortice.core.plugin.conformance import contract_faults
from mortice.core.plugin.interfaces import StepPart
from mortice.core.plugin.registry import Registry
from mortice.core.stages import open_file
from mortice.core.testing.contract_variants import Variant, variants_of
from mortice.core.testing.gguf_files import TensorData, write_gguf
from mortice.core.testing.registries import registry_with
from mortice.core.testing.suite import Suite, each, fail, require, skip
from mortice.core.testing.tiny_models import DEFAULT_SIZES, write_tiny_model

__all__ = ["ContractSuite"]

Logits = NDArray[np.float32]
IDS = (7, 301, 12, 12, 450, 3, 77, 128)
_CLOSE = 1e-3  # of the largest logit: float32 sums in another order
_VOCABULARY = "vocab_size"  # read from several places, see `resolve_hyperparameters`


class ContractSuite(Suite):
    """Holds a contract against tiny models that are made of it.

    Attributes:
        contract: what is checked.
        sizes: hyperparameters of the tiny models, where `DEFAULT_SIZES` do not suit the family.
        metadata: keys the family cannot do without, as they stand in the file, prefix included.
        own_head_dim: whether heads may have another size than hidden_size / num_heads.
        oracle: another implementation of the family: logits or log-probabilities, float32 of shape (tokens,
            vocab_size), of a GGUF file and token ids. The reference executor is held against it.

    """

    contract: Contract
    sizes: Mapping[str, Any] = {}
    metadata: Mapping[str, Any] = {}
    own_head_dim: bool = True
    oracle: Callable[[Path, Sequence[int]], Logits] | None = None

    # what the checks share --------------------------------------------------------------------------------------

    @property
    def registry(self) -> Registry:
        """The built-ins, with the contract in front."""
        return self.once("registry", lambda: registry_with(contracts=[self.contract]))

    def variants(self) -> list[Variant]:
        """The kinds of file that are tried."""
        return list(variants_of(self.contract))

    def write(self, folder: Path, variant: Variant | None = None, **arguments: Any) -> Path:
        """A tiny model; `arguments` are those of `write_tiny_model`, and win over the variant's."""
        chosen = {**(variant or self.variants()[0]).arguments, **arguments}
        sizes = {**self.sizes, **chosen.pop("sizes", {})}
        path = folder / f"{self.contract.name}-{len(list(folder.iterdir()))}.gguf"
        metadata = {**self.metadata, **chosen.pop("metadata", {})}
        return write_tiny_model(path, self.contract, sizes=sizes, metadata=metadata, **chosen)

    def opened(self, folder: Path, variant: Variant | None = None, **arguments: Any) -> ModelFile:
        """A tiny model as the GGUF loader shows it."""
        return open_file(self.registry, self.write(folder, variant, **arguments))

    def logits(self, path: Path, *, one_by_one: bool = False) -> Logits:
        """The reference executor's logits after each of `IDS`, in one step or one step each."""
        with prepare(_config(path), self.registry) as pipeline:
            steps = [[token] for token in IDS] if one_by_one else [list(IDS)]
            sequence = pipeline.runtime.new_sequence()
            parts = [StepPart(sequence=sequence, token_ids=ids, logits="all") for ids in steps]
            return np.vstack([pipeline.runtime.step([part]) for part in parts])

    def _operators(self, file: ModelFile) -> tuple[Operator, ...]:
        return build_program(validate(file, self.contract).model()).operators

    # consistency ------------------------------------------------------------------------------------------------

    def test_the_contract_does_not_contradict_itself(self) -> None:
        """Nothing in it is at odds with the rest, and it says whom it is for."""
        faults = list(contract_faults(self.contract))
        require(not faults, "; ".join(faults))
        require(self.contract.architectures, f"contract {self.contract.name} serves no architecture")
        require(self.contract.description, f"contract {self.contract.name} has no description, which listings show")

    @each("architecture", lambda suite: suite.contract.architectures)
    def test_the_registry_finds_it(self, architecture: str, tmp_path: Path) -> None:
        """A file of each architecture it names gets this contract."""
        with open_file(self.registry, self.write(tmp_path, architecture=architecture)) as file:
            found = self.registry.contract_for(file)
        require(found is self.contract, f"{architecture}: served by contract {found.name}")

    # roles ------------------------------------------------------------------------------------------------------

    @each("role", lambda suite: _roles(suite.contract, "required"))
    def test_a_missing_weight_is_reported(self, role: str, tmp_path: Path) -> None:
        """A file without a required weight is refused, and the tensor named."""
        with self.opened(tmp_path) as file:
            name = self._tensor(role)
            changed = evolve(file, tensors=_without(file.tensors, name), close=None)
            self._expect(changed, "role.missing", name)

    @each("role", lambda suite: _roles(suite.contract, "required"))
    def test_a_wrong_shape_is_reported(self, role: str, tmp_path: Path) -> None:
        """A weight with one row too many is refused, and the tensor named."""
        with self.opened(tmp_path) as file:
            view = file.tensors[self._tensor(role)]
            shape = (view.shape[0] + 1, *view.shape[1:])
            wrong = TensorData.f32(view.name, np.zeros(shape, np.float32)).view(file.path)
            changed = evolve(file, tensors={**file.tensors, view.name: wrong}, close=None)
            self._expect(changed, "role.shape", view.name)

    @each("role", lambda suite: _roles(suite.contract, "forbidden"))
    def test_a_forbidden_weight_is_reported(self, role: str, tmp_path: Path) -> None:
        """A weight that the family does not have is refused."""
        with self.opened(tmp_path) as file:
            extra = TensorData.f32(self._tensor(role), np.zeros(64, np.float32)).view(file.path)
            changed = evolve(file, tensors={**file.tensors, extra.name: extra}, close=None)
            self._expect(changed, "role.forbidden", extra.name)

    def test_a_weight_that_no_role_names_is_reported(self, tmp_path: Path) -> None:
        """Nothing in a file is passed over in silence."""
        with self.opened(tmp_path) as file:
            extra = TensorData.f32("blk.0.attn_sinks.weight", np.zeros(4, np.float32)).view(file.path)
            changed = evolve(file, tensors={**file.tensors, extra.name: extra}, close=None)
            errors = validate(changed, self.contract).findings.errors
        require(any(finding.subject == extra.name for finding in errors), f"{extra.name} passed validation")

    # hyperparameters --------------------------------------------------------------------------------------------

    @each("name", lambda suite: _required_numbers(suite.contract))
    def test_a_missing_hyperparameter_is_reported(self, name: str, tmp_path: Path) -> None:
        """A number that has no default has to be in the file."""
        with self.opened(tmp_path) as file:
            key = f"{file.architecture}.{self.contract.hyperparameters[name].key}"
            metadata = {other: value for other, value in file.metadata.items() if other != key}
            errors = validate(evolve(file, metadata=metadata, close=None), self.contract).findings.errors
        require(any(finding.subject == key for finding in errors), f"{key}: a file without it passed validation")

    @each("name", lambda suite: _defaulted_numbers(suite.contract, suite.sizes))
    def test_a_default_is_the_value_it_stands_for(self, name: str, tmp_path: Path) -> None:
        """A file that states a default builds the same operators as one that leaves it out."""
        with self.opened(tmp_path) as file:
            numbers, findings = resolve_hyperparameters(self.contract, file)
            require(not findings, "; ".join(map(str, findings)))
            hyperparameter = self.contract.hyperparameters[name]
            value: Any = numbers.values[name]
            if isinstance(value, tuple):
                value = np.array(value, {"int": np.int32, "float": np.float32, "bool": np.bool_}[hyperparameter.kind])
            elif hyperparameter.kind == "bool":
                value = bool(value)
            elif hyperparameter.kind == "float":
                value = float(value)
            key = f"{file.architecture}.{hyperparameter.key}"
            if key in file.metadata:
                skip(f"{key} is among the metadata the family cannot do without")
            stated = self._operators(evolve(file, metadata={**file.metadata, key: value}, close=None))
            require(stated == self._operators(file), f"{key} = {value} does not build what leaving it out builds")

    # the program ------------------------------------------------------------------------------------------------

    @each("variant", lambda suite: suite.variants())
    def test_the_program_builds(self, variant: Variant, tmp_path: Path) -> None:
        """Every kind of file fits the contract, and its weights all have a use."""
        with self.opened(tmp_path, variant) as file:
            require(self._operators(file), "the program has no operator")

    def test_heads_may_have_a_size_of_their_own(self, tmp_path: Path) -> None:
        """Shapes follow head_dim, and do not take it for hidden_size / num_heads."""
        if not self.own_head_dim:
            skip("own_head_dim is false: the family has heads of hidden_size / num_heads")
        hidden, heads = (int({**DEFAULT_SIZES, **self.sizes}[name]) for name in ("hidden_size", "num_heads"))
        with self.opened(tmp_path, sizes={"head_dim": 2 * hidden // heads}) as file:
            self._operators(file)

    @each("variant", lambda suite: suite.variants())
    def test_the_reference_executor_runs_it(self, variant: Variant, tmp_path: Path) -> None:
        """Logits are finite, differ from token to token, and do not depend on how tokens are fed."""
        path = self.write(tmp_path, variant)
        at_once, one_by_one = self.logits(path), self.logits(path, one_by_one=True)
        require(np.isfinite(at_once).all(), "there are logits that are not finite")
        require(np.ptp(at_once, axis=0).max() > 0, "every token gives the same logits")
        off = float(np.abs(at_once - one_by_one).max() / np.abs(at_once).max())
        require(off < _CLOSE, f"tokens fed one by one give logits {off:.2g} off, wanted at most {_CLOSE:.2g}")

    @each("role", lambda suite: _roles(suite.contract, "required"))
    def test_a_weight_has_an_effect(self, role: str, tmp_path: Path) -> None:
        """Other values of a required weight give other logits."""
        path = self.write(tmp_path)
        name = self._tensor(role)
        with open_file(self.registry, path) as file:
            view = file.tensors[name]
            noise = 1 + 0.5 * np.random.default_rng(5).standard_normal(view.shape, np.float32)
            values = (view.data.view(np.float32).reshape(view.shape) * noise).astype(np.float32)
            tensors = {**file.tensors, name: TensorData.f32(name, values).view(path)}
            with prepare_opened(_config(path), self.registry, evolve(file, tensors=tensors, close=None)) as changed:
                found = changed.logits(IDS)
        require(not np.array_equal(found, self.logits(path)), f"{name}: other values give the same logits")

    def test_quantised_weights_give_nearly_the_same(self, tmp_path: Path) -> None:
        """The program takes weights of any type: Q8_0 is close to F32."""
        wide = {"hidden_size": 64, "ffn_size": 128, **self.sizes}
        if any(int(wide[name]) % GGML_TYPES[8].block_elements for name in ("hidden_size", "ffn_size")):
            skip("sizes: rows are not whole blocks of Q8_0")
        exact, rounded = (self.logits(self.write(tmp_path, qtypes=name)) for name in ("F32", "Q8_0"))
        error = float(np.square(exact - rounded).sum() / np.square(exact).sum())
        require(error < 1e-2, f"logits with Q8_0 weights are {error:.2g} off (NMSE), wanted below 0.01")

    @each("variant", lambda suite: suite.variants())
    def test_a_file_goes_through_writer_and_loader_unchanged(self, variant: Variant, tmp_path: Path) -> None:
        """What the GGUF loader shows, written again, is the same file."""
        path = self.write(tmp_path, variant)
        with open_file(self.registry, path) as file:
            tensors = [TensorData(view.name, view.shape, view.qtype, view.data) for view in file.tensors.values()]
            again = write_gguf(tmp_path / "again.gguf", file.architecture, file.metadata, tensors)
        require(again.read_bytes() == path.read_bytes(), "writing what was read gives another file")

    @each("variant", lambda suite: suite.variants())
    def test_logits_are_those_of_the_oracle(self, variant: Variant, tmp_path: Path) -> None:
        """Another implementation of the family agrees."""
        oracle = type(self).oracle
        if oracle is None:
            skip("oracle: none is given, so nothing says that the contract describes the family")
        path = self.write(tmp_path, variant)
        found, wanted = self.logits(path), oracle(path, IDS)
        require(wanted.shape == found.shape, f"the oracle gave logits of shape {wanted.shape}, wanted {found.shape}")
        # a constant in a row changes no probability, and log-probabilities are all that some implementations show
        found, wanted = (rows - rows.mean(axis=1, keepdims=True) for rows in (found, wanted))
        error = float(np.square(found - wanted).sum() / np.square(wanted).sum())
        require(math.isfinite(error) and error < 2e-3, f"logits are {error:.2g} off (NMSE), wanted below 0.002")
        top, best = found.argmax(axis=1), wanted.argmax(axis=1)
        require(np.array_equal(top, best), f"best tokens are {top.tolist()}, the oracle's {best.tolist()}")

    # ------------------------------------------------------------------------------------------------------------

    def _tensor(self, role: str) -> str:
        """The tensor of a role, in layer 0 where layers have it."""
        if role in self.contract.global_roles:
            return self.contract.global_roles[role].tensor(None)
        return self.contract.layer_roles[role].tensor(0)

    def _expect(self, file: ModelFile, rule: str, subject: str) -> None:
        errors = validate(file, self.contract).findings.errors
        found = [finding for finding in errors if (finding.rule, finding.subject) == (rule, subject)]
        if not found:
            said = "; ".join(map(str, errors)) or "nothing"
            fail(f"{subject}: wanted an error {rule}, validation said {said}")


def _config(path: Path) -> RunConfig:
    return RunConfig(model=ModelConfig(path=path), executor=ExecutorConfig(name="reference"))


def _without(tensors: Mapping[str, TensorView], name: str) -> dict[str, TensorView]:
    return {other: view for other, view in tensors.items() if other != name}


def _all_roles(contract: Contract) -> Iterator[tuple[str, Role]]:
    yield from contract.global_roles.items()
    yield from contract.layer_roles.items()


def _roles(contract: Contract, presence: str) -> list[str]:
    return [key for key, role in _all_roles(contract) if role.presence == presence]


def _required_numbers(contract: Contract) -> list[str]:
    return [
        name
        for name, hyperparameter in contract.hyperparameters.items()
        if hyperparameter.default is None and name != _VOCABULARY
    ]


def _defaulted_numbers(contract: Contract, sizes: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name, hyperparameter in contract.hyperparameters.items()
        if hyperparameter.default is not None and name not in {**DEFAULT_SIZES, **sizes}
    ]
