"""The times that an embedding asks for, as kernels see them: two bits a slot."""

TIMES = ("t", "r", "t-r")


def slot_codes(times: str) -> tuple[int, int]:
    """How many slots a list such as "t,r,t-r" has, and their codes: a slot's index in TIMES."""
    codes = [TIMES.index(time) for time in times.split(",")]
    return len(codes), sum(code << (2 * slot) for slot, code in enumerate(codes))
