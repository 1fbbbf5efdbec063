"""City photographs, aerial scenes, camera sequences."""
