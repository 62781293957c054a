"""Numbers by path: what is unknown is refused by name, and what the user assumes is recorded."""

from __future__ import annotations

import pytest

from transload.errors import DeploymentError
from transload.hardware.catalog import load_chip, load_link
from transload.hardware.quantity import Assumption, Quantity, format_amount, in_base_unit, kinds_of, parse_amount
from transload.hardware.slots import parse_assumption, with_assumptions


def refusal(path: str, chip: str = "rubin_cpx") -> str:
    with pytest.raises(DeploymentError) as caught:
        load_chip(chip).need(path)
    return str(caught.value)


def test_an_unknown_number_is_refused_with_the_reason_and_the_way_out() -> None:
    message = refusal("dense_flops.fp4")
    assert message.startswith("rubin_cpx: dense_flops.fp4 is unknown: NVIDIA publishes 30 PFLOP/s NVFP4 without saying")
    assert '--assume "rubin_cpx.dense_flops.fp4=NUMBER FLOP/s"' in message
    assert "a file of your own" in message


def test_an_unknown_number_of_a_link_is_refused_too() -> None:
    with pytest.raises(DeploymentError, match=r"lpx_nvl_bridge: bandwidth is unknown: not published\."):
        load_link("lpx_nvl_bridge").need("bandwidth")


def test_a_reason_is_not_borrowed_from_another_quantity() -> None:
    assert "not published" not in refusal("scale_up.latency", "sn40l")
    assert refusal("power.idle", "h100").startswith("h100_sxm: power.idle is unknown. To go on")


def test_a_quantity_that_does_not_exist_is_refused_with_the_one_that_was_meant() -> None:
    assert 'it has no quantity memory.hbm.bandwith; did you mean "memory.hbm.bandwidth"?' in refusal(
        "memory.hbm.bandwith", "h100"
    )


def test_an_assumption_takes_the_place_of_an_unknown_and_is_listed() -> None:
    (chip,) = with_assumptions([load_chip("rubin_cpx")], ["rubin_cpx.dense_flops.fp4=20 PFLOP/s"])
    assumed = chip.need("dense_flops.fp4")
    assert (assumed.value, assumed.unit, assumed.kind) == (2e16, "FLOP/s", "assumption")
    assert [str(entry) for entry in chip.assumptions()] == ["rubin_cpx.dense_flops.fp4 = 20 PFLOP/s"]
    assert chip.ridge_point("fp4") == pytest.approx(10_000)
    assert load_chip("rubin_cpx").assumptions() == []


def test_an_assumption_against_the_catalog_keeps_what_it_replaced() -> None:
    (chip,) = with_assumptions([load_chip("b200")], ["b200.memory.hbm.bandwidth=8e12"])
    quantity = chip.need("memory.hbm.bandwidth")
    assert (quantity.value, quantity.unit) == (8e12, "B/s")
    assert quantity.note == "instead of the catalog's 7.7 TB/s (datasheet)"


@pytest.mark.parametrize(
    ("path", "amount", "value"),
    [
        ("price.per_hour", "3 USD/h", 3.0),
        ("power.all_in", "12 kW", 12_000.0),
        ("memory.sram.bandwidth", "100 TB/s", 1e14),
        ("memory.ddr.capacity", "1 TiB", 2.0**40),
        ("scale_up.latency", "2 us", 2e-6),
        ("system.figures.power", "20 kW", 20_000.0),
    ],
)
def test_any_slot_can_be_assumed(path: str, amount: str, value: float) -> None:
    (chip,) = with_assumptions([load_chip("sn50")], [f"sn50.{path}={amount}"])
    assert chip.need(path).value == pytest.approx(value)
    assert [entry.quantity for entry in chip.assumptions()] == [path]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("dense_flops", "wanted ID.QUANTITY=VALUE"),
        ("h100.power.tdp", "wanted ID.QUANTITY=VALUE"),
        ("h100.power.tdp=lots", '"lots" is not a number with a unit'),
        ("h100.power.tdp=700 J", 'no such unit "J"'),
        ("h100.power.tdp=700 s", "that is in s; power.tdp is in W"),
        ("h100.power.tdp=-1 W", "not below 0"),
        ("h100.power.tpd=700 W", 'no quantity power.tpd; did you mean "power.tdp"?'),
        ("h10.power.tdp=700 W", 'nothing here is called h10; did you mean "h100"?'),
        ("h100.power.tdp=1e999 W", "not a number to calculate with"),
        ("h100.power.tdp=1e999", "not a number to calculate with"),
    ],
)
def test_an_assumption_that_makes_no_sense_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(DeploymentError) as caught:
        with_assumptions([load_chip("h100")], [text])
    assert complaint in str(caught.value)
    assert str(caught.value).startswith("--assume ")


def test_an_assumption_is_plain_data() -> None:
    assert parse_assumption("a.b.c = 2 GB/s") == Assumption(subject="a", quantity="b.c", value=2e9, unit="B/s")
    assert parse_assumption("a.b=2") == Assumption(subject="a", quantity="b", value=2, unit=None)


@pytest.mark.parametrize(
    ("value", "unit", "base"),
    [
        (2.039, "TB/s", (2_039_000_000_000.0, "B/s")),
        (400, "Gb/s", (5e10, "B/s")),
        (80, "GiB", (80 * 2.0**30, "B")),
        (350, "ns", (3.5e-7, "s")),
        (9, "PFLOP/s", (9e15, "FLOP/s")),
        (1.73, "kW", (1730.0, "W")),
    ],
)
def test_units_become_base_units_exactly(value: float, unit: str, base: tuple[float, str]) -> None:
    assert in_base_unit(value, unit) == base


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (3.35e12, "B/s", "3.35 TB/s"),
        (44e9, "B", "44 GB"),
        (1e-5, "s", "10 us"),
        (3.5e-7, "s", "350 ns"),
        (989e12, "FLOP/s", "989 TFLOP/s"),
        (1.69, "USD/h", "$1.69/h"),
        (3_250_000, "USD", "$3,250,000"),
        (900_000, "count", "900,000"),
        (0.318, "count", "0.318"),
        (215, "W", "215 W"),
        (671e9, "parameters", "671.00 B"),
    ],
)
def test_amounts_are_shown_as_people_write_them(value: float, unit: str, text: str) -> None:
    assert format_amount(value, unit) == text


def test_amounts_are_read_with_or_without_a_unit() -> None:
    assert parse_amount("20 PFLOP/s") == (2e16, "FLOP/s")
    assert parse_amount(" 2.5e3 ") == (2500.0, None)


def test_a_result_can_say_how_solid_its_numbers_are() -> None:
    def number(kind: str) -> Quantity:
        return Quantity(value=1, unit="s", source="me", kind=kind)  # type: ignore[arg-type]

    counted = kinds_of([number("estimate"), number("datasheet"), number("estimate")])
    assert list(counted.items()) == [("datasheet", 1), ("estimate", 2)]
