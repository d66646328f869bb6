"""The model by which attention's tiles are chosen, by hand."""

import pytest

from benchmarks.static.cubin import Resources
from benchmarks.static.launches import Launch
from benchmarks.static.sass import of_a_trip
from benchmarks.tune import attention

TRIP = """
.L_x_0:
        /*0000*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10] ;
        /*0010*/                   UTCBAR [UR12], URZ ;
        /*0020*/                   UTCBAR [UR13], URZ ;
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR5], R4 ;
        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR5+0x10], R4 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   UTCBAR [UR12], URZ ;
        /*0070*/               @P0 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
"""


def test_products_under_way_answer_together():
    """The third commit is waited for in the next trip."""
    trip = of_a_trip(TRIP)
    assert (trip.answers, trip.barriers, trip.instructions) == (2, 1, 8)
    assert of_a_trip(TRIP.replace("UTCBAR", "NOP")).answers == 0


@pytest.mark.parametrize(
    "arch, ones, products, awaited",
    [
        (80, 8, 4 * (3 * 80 + 3 * 80 + 2 * 8), 0.5),  # 8 warps: a quarter's two by turns
        (90, 8, 2 * (3 * 80 + 3 * (64 + 32) + 2 * 32), 1),
        (100, 0, 2 * (3 * 80 + 3 * (64 + 32)), 1),  # 64 rows of 128
    ],
)
def test_a_tile_by_hand(monkeypatch, arch, ones, products, awaited):
    resources = Resources(255, 0, 0, 9, 1, 0, 1, 0)
    monkeypatch.setattr(attention, "compile_and_read", lambda *_: (resources, TRIP))
    of = dict(ROWS=64, COLUMNS=64, A=64, B=16, D=72, ONES=ones)
    reading = attention.read(Launch(None, of, {"num_warps": 8}, ()), arch)
    assert reading.products == products and reading.issue == 8 * 8 / 4
    assert reading.latency == products * awaited + 8 * 2 + 40 + 2 * 250
    assert reading.loads == 4 * 64 * 72 * 2 / 24 and reading.warps == 8
    assert reading.clocks > max(reading.products, reading.latency)
