"use strict";

// validatorUrl: by default Swagger UI shows every page's address to a host of its own.
SwaggerUIBundle({ url: "openapi.json", dom_id: "#api", deepLinking: true, validatorUrl: null });
