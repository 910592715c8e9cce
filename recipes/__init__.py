"""The sources of the recipes. They are imported as `mlopt.recipes`, whose `__path__` includes this folder."""

raise ImportError("import it as `mlopt.recipes`: the folder `recipes` is a part of mlopt, not a package of its own")
