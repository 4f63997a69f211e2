"""Enrollment: join tokens, signing requests, approval, renewal, revocation.

``desk`` decides, ``papers`` writes certificates and passports, ``book`` remembers.
"""

from registry.enrollment.book import Token, Waiting
from registry.enrollment.desk import Answer, EnrollmentDesk

__all__ = ["Answer", "EnrollmentDesk", "Token", "Waiting"]
