"""Enrollment: join tokens, signing requests, approval, renewal, revocation.

``service`` is on the wire, ``desk`` decides, ``papers`` writes certificates and passports, and
``book`` remembers.
"""

from registry.enrollment.book import Token, Waiting
from registry.enrollment.desk import EnrollmentDesk
from registry.enrollment.grants import Answer
from registry.enrollment.service import EnrollmentService

__all__ = ["Answer", "EnrollmentDesk", "EnrollmentService", "Token", "Waiting"]
