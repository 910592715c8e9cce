"""Run the benchmark of the modality named by the first argument; molecules if it names none."""

import importlib
import sys

MODALITIES = ("molecules", "text")

arguments = sys.argv[1:]
named = arguments[:1] if arguments[:1] and arguments[0] in MODALITIES else []
modality = named[0] if named else "molecules"
importlib.import_module(f".{modality}", __package__).main(arguments[len(named) :])
