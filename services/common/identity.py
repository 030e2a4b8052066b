"""Keys and what their bearer may do."""

import hashlib
import secrets
from dataclasses import dataclass
from enum import StrEnum

from services.common.errors import Forbidden, NotFound

KEY_BYTES = 32  # 256 random bits: a plain SHA-256 of it needs no salt and no slow hash
SHOWN_CHARACTERS = 4


class Role(StrEnum):
    """A new role may do nothing until a use case names it."""

    DEVICE = "device"
    FIRM = "firm"
    PARTNER = "partner"
    # One expert, facility, workshop or course of a partner, for itself; one expert as an assessor. They come with tokens.
    PROVIDER = "provider"
    ASSESSOR = "assessor"
    OPERATOR = "operator"


# Whoever is not among these comes with a token.
KEY_ROLES = (Role.DEVICE, Role.FIRM, Role.PARTNER, Role.OPERATOR)


@dataclass(frozen=True)
class Caller:
    """Who sent a request, as its key or token says.

    `credential_id` is below 0 for a person with a token, who then has a `subject` (the issuer's name of him) and an end.
    """

    credential_id: int
    role: Role
    firm_id: int = 0
    partner_id: int = 0
    provider_id: str = ""
    subject: str = ""
    valid_to_us: int = 0

    @property
    def is_person(self) -> bool:
        return self.credential_id < 0

    def require(self, *roles: Role) -> None:
        """Raise Forbidden unless the caller has one of the roles."""
        if self.role not in roles:
            raise Forbidden(f"A key of role {self.role} may not do this; it needs {' or '.join(roles)}.")

    def firm_or(self, requested_firm_id: int) -> int:
        """The firm that a request is about: the caller's own, or for operators the one asked for (0: none named)."""
        if self.role is Role.OPERATOR:
            return requested_firm_id
        if not self.firm_id or requested_firm_id not in (0, self.firm_id):
            raise Forbidden("This key does not belong to that firm.")
        return self.firm_id

    def check_sees_firm(self, firm_id: int) -> None:
        """Raise NotFound (not Forbidden: ids of other firms are not confirmed) unless the caller may see the firm's things."""
        if self.role is not Role.OPERATOR and (not self.firm_id or self.firm_id != firm_id):
            raise NotFound()

    def has_part_in(self, *, firm_id: int, provider_id: str, partner_id: int) -> bool:
        """Whether the caller may see what a firm and a provider have with each other: either of them, or an operator."""
        if self.role is Role.FIRM:
            return self.firm_id == firm_id
        return self.role is Role.OPERATOR or self.acts_for(provider_id=provider_id, partner_id=partner_id)

    def acts_for(self, *, provider_id: str, partner_id: int) -> bool:
        """Whether the caller is this provider, or the partner that it belongs to."""
        if self.role is Role.PARTNER:
            return bool(partner_id) and self.partner_id == partner_id
        return self.role in (Role.PROVIDER, Role.ASSESSOR) and bool(provider_id) and self.provider_id == provider_id


def new_key(role: Role) -> str:
    """A fresh key such as "smdih_device_Ab3...": shown once, never stored."""
    return f"smdih_{role}_{secrets.token_urlsafe(KEY_BYTES)}"


def key_sha256(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def key_prefix(key: str) -> str:
    """What may be shown of a key made by `new_key`: its role and a few characters to recognise it by."""
    label, role, secret = key.split("_", 2)
    return f"{label}_{role}_{secret[:SHOWN_CHARACTERS]}"


def bearer_key(header: str) -> str:
    """The key in an Authorization header ("Bearer KEY" or "Token KEY"); empty if there is none."""
    scheme, _, key = header.strip().partition(" ")
    return key.strip() if scheme.lower() in ("bearer", "token") else ""
