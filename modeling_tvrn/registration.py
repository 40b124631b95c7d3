"""Registers our classes with transformers' Auto classes once both sides are loaded, and loads neither before that.

`AutoModel.register` wants the class itself, and the class wants torch: registering at import would cost every importer
(a data script, a `--help`) some four seconds and 370 MB. transformers itself loads its Auto classes on first use, so
we follow: a finder on `sys.meta_path` watches for the modules of the Auto classes and for our own, and registers each
pair when its second half has finished. Watching our own too is what makes `from modeling_tvrn import TVRNModel` work,
where our module is half-way through when it imports the Auto classes.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import NamedTuple


class _Registration(NamedTuple):
    auto_module: str
    auto_class: str
    own_module: str
    own_class: str


class _RegisteringFinder(MetaPathFinder):
    """Finds modules as Python does, and calls `register` after each that matters has run."""

    def __init__(self, registrations: Sequence[_Registration], config_module: str) -> None:
        self.pending = list(registrations)
        self.config_module = config_module
        self.auto_modules = {each.auto_module for each in registrations}
        self.shipped = f"{config_module.rpartition('.')[0]}."
        self.finished = {name for name in sys.modules if self.is_watched(name)}

    def is_watched(self, name: str) -> bool:
        """Whether a module is one of the Auto classes', or a shipped one of ours, any of which may load those."""
        return name in self.auto_modules or (name.startswith(self.shipped) and name.endswith("_tvrn"))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if self.is_watched(fullname) else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            self.finished.add(fullname)
            self.register()

        # On the instance, so that the module keeps Python's own loader (inspect and pickling look at it).
        setattr(spec.loader, "exec_module", execute_and_register)  # noqa: B010
        return spec

    def register(self) -> None:
        """Register every pair whose Auto class has loaded, unless a shipped file is being loaded right now, which ours
        may import: then its end calls again."""
        for each in list(self.pending):
            being_loaded = any(self.is_watched(name) and name not in self.finished for name in list(sys.modules))
            if each.auto_module in self.finished and not being_loaded:
                own_class = getattr(importlib.import_module(each.own_module), each.own_class)
                if each in self.pending:  # importing ours came back here through `execute_and_register`
                    self.pending.remove(each)
                    self._tell(each, own_class)

    def _tell(self, registration: _Registration, own_class: type) -> None:
        auto_class = getattr(sys.modules[registration.auto_module], registration.auto_class)
        config_class = importlib.import_module(self.config_module).TVRNConfig
        auto_class.register("tvrn" if own_class is config_class else config_class, own_class)


def register_when_imported(package: str) -> None:
    """Make AutoConfig, AutoModel and AutoProcessor know "tvrn": now those that are loaded, the others when they
    are."""
    auto, config_module = "transformers.models.auto", f"{package}.configuration_tvrn"
    model = f"{package}.modeling_tvrn", "TVRNModel"
    finder = _RegisteringFinder(
        [
            _Registration(f"{auto}.configuration_auto", "AutoConfig", config_module, "TVRNConfig"),
            _Registration(f"{auto}.modeling_auto", "AutoModel", *model),
            _Registration(f"{auto}.modeling_auto", "AutoModelForZeroShotImageClassification", *model),
            _Registration(f"{auto}.processing_auto", "AutoProcessor", f"{package}.processing_tvrn", "TVRNProcessor"),
        ],
        config_module,
    )
    sys.meta_path.insert(0, finder)
    finder.register()
