"""An environment of verifiers' first interface, as most were written: `import verifiers as vf`."""

import verifiers as vf


class Game(vf.MultiTurnEnv):  # pyright: ignore[reportAttributeAccessIssue]
    pass


def load_environment(**options):
    return Game(**options)
