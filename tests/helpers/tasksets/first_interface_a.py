"""An environment of verifiers' first interface: it asks verifiers for a name that is gone."""

from verifiers import SingleTurnEnv  # pyright: ignore[reportAttributeAccessIssue]


def load_environment(**options):
    return SingleTurnEnv(**options)
