"""The small trained story of the stages, for what looks at it from outside."""

from tests.stages.conftest import own_story, story

__all__ = ["own_story", "story"]
