package refusal

import (
	"net/http"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

type openAIBody struct {
	Error   openAIError `json:"error"`
	Problem *document   `json:"problem"`
}

type openAIError struct {
	Message string  `json:"message"`
	Type    string  `json:"type"`
	Param   *string `json:"param"`
	Code    string  `json:"code"`
}

type anthropicBody struct {
	Type      string         `json:"type"`
	Error     anthropicError `json:"error"`
	RequestID string         `json:"request_id,omitempty"`
	Problem   *document      `json:"problem"`
}

type anthropicError struct {
	Type    string `json:"type"`
	Message string `json:"message"`
}

type flatBody struct {
	Status  int        `json:"status"`
	Code    usage.Code `json:"code"`
	Message string     `json:"message"`
}

// render returns the content type and the value to be written as JSON.
func render(d *document, p Profile) (string, any) {
	message := d.Detail + " " + d.Resolution
	switch p {
	case OpenAI:
		typ, code := openAIWords(d.Status)
		return "application/json", openAIBody{openAIError{Message: message, Type: typ, Code: code}, d}
	case Anthropic:
		return "application/json", anthropicBody{"error", anthropicError{anthropicType(d.Status), message}, d.RequestID, d}
	case Flat:
		return "application/json", flatBody{d.Status, d.Code, message}
	}
	return "application/problem+json", d
}

// openAIWords are the type and code that OpenAI's clients look at.
func openAIWords(status int) (typ, code string) {
	switch status {
	case http.StatusPaymentRequired:
		return "insufficient_quota", "insufficient_quota"
	case http.StatusTooManyRequests:
		return "requests", "rate_limit_exceeded"
	case http.StatusUnauthorized:
		return "invalid_request_error", "invalid_api_key"
	case http.StatusForbidden:
		return "invalid_request_error", "cost_exceeds_limit"
	}
	if status >= 500 {
		return "server_error", "server_error"
	}
	return "invalid_request_error", "invalid_request"
}

func anthropicType(status int) string {
	switch status {
	case http.StatusPaymentRequired:
		return "billing_error"
	case http.StatusTooManyRequests:
		return "rate_limit_error"
	case http.StatusUnauthorized:
		return "authentication_error"
	case http.StatusForbidden:
		return "permission_error"
	case http.StatusNotFound:
		return "not_found_error"
	case http.StatusRequestEntityTooLarge:
		return "request_too_large"
	case http.StatusServiceUnavailable:
		return "overloaded_error"
	case http.StatusGatewayTimeout:
		return "timeout_error"
	}
	if status >= 500 {
		return "api_error"
	}
	return "invalid_request_error"
}
