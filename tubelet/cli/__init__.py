"""The command line: one module per group of commands, all on one app."""

import importlib
import pkgutil

from tubelet.cli.app import app, main

# Importing a module adds its commands; there is no list to keep.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["app", "main"]
