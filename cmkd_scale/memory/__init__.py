"""The prototype memory: the teacher's global class-conditional feature distribution."""
