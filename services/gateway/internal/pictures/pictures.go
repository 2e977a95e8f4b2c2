// Package pictures tells how much of a request's body is pictures, sound and films that
// stand in it as base64, and how many tokens those can be: far fewer than they have
// bytes.
package pictures

import (
	"bytes"
	"encoding/base64"
	"net/http"
	"strings"
)

const (
	// Tokens is the most that a provider counts for one picture: Anthropic's larger
	// models stop at 4,784, Gemini at 16 tiles of 258, OpenAI below both.
	Tokens = 5000
	// PerToken are bytes of base64 of sound or film that are one token at least. Sound
	// is at most 32 tokens a second, and speech is seldom coded in less than 5 kbit/s.
	PerToken = 24
	// sniffed are characters of base64 that say what it is of.
	sniffed = 64
)

// Beyond returns by how many the bytes of a JSON body are more than the tokens that it
// can be, because of pictures, sound and films in it. What is of another kind, like a
// document, is as many tokens as it has bytes.
func Beyond(body []byte) (beyond int64) {
	for len(body) > 0 {
		open := bytes.IndexByte(body, '"')
		if open < 0 {
			return beyond
		}
		body = body[open+1:]
		end := endOfString(body)
		if end > PerToken*sniffed {
			beyond += excess(body[:end])
		}
		body = body[min(end+1, len(body)):]
	}
	return beyond
}

// endOfString is where the quotation mark stands that ends a string.
func endOfString(s []byte) int {
	for at := 0; ; {
		n := bytes.IndexByte(s[at:], '"')
		if n < 0 {
			return len(s)
		}
		escapes := 0
		for i := at + n - 1; i >= 0 && s[i] == '\\'; i-- {
			escapes++
		}
		if at += n; escapes%2 == 0 {
			return at
		}
		at++
	}
}

func excess(s []byte) int64 {
	text := s
	if head := s[:min(len(s), 256)]; bytes.HasPrefix(head, []byte("data:")) {
		if _, after, found := bytes.Cut(head, []byte(";base64,")); found {
			text = s[len(head)-len(after):]
		}
	}
	start := strings.ReplaceAll(string(text[:min(len(text), 2*sniffed)]), `\/`, "/")
	start = start[:min(len(start), sniffed)]
	raw := make([]byte, base64.StdEncoding.DecodedLen(len(start)))
	n, err := base64.StdEncoding.Decode(raw, []byte(start))
	if err != nil {
		if n, err = base64.URLEncoding.Decode(raw, []byte(start)); err != nil {
			return 0
		}
	}
	size := int64(len(s))
	switch kind := http.DetectContentType(raw[:n]); {
	case strings.HasPrefix(kind, "image/"):
		return max(size-Tokens, 0)
	case strings.HasPrefix(kind, "audio/"), strings.HasPrefix(kind, "video/"), kind == "application/ogg":
		return size - size/PerToken
	}
	return 0
}
