"""Date arithmetic of the rules: whole months, UK public financial years, rolling years. Days without time."""

from calendar import monthrange
from datetime import MAXYEAR, MINYEAR, date, timedelta

from services.funding.rules.exact import InvalidFact


def add_months(day: date, months: int) -> date:
    """The same day ``months`` later (or earlier, if negative), or the month's last day if it has no such day.

    31 August + 3 is 30 November; 30 November + 3 is 28 or 29 February; 28 February + 3 is 28 May.

    Raises:
        InvalidFact: the result is before the year 1 or after 9999.
    """
    year, month0 = divmod(day.year * 12 + day.month - 1 + months, 12)
    if not MINYEAR <= year <= MAXYEAR:
        raise InvalidFact(f"{months} months from {day.isoformat()} is no date")
    return date(year, month0 + 1, min(day.day, monthrange(year, month0 + 1)[1]))


def financial_year_start(day: date) -> date:
    """The 1 April on or before the day."""
    return date(day.year if (day.month, day.day) >= (4, 1) else day.year - 1, 4, 1)


def rolling_years_start(last_day: date, years: int) -> date:
    """First day of the period of ``years`` whole years that ends with, and includes, ``last_day``."""
    return add_months(last_day, -12 * years) + timedelta(days=1)
