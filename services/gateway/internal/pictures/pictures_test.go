package pictures

import (
	"encoding/base64"
	"strings"
	"testing"
)

func TestPicturesAndSoundAreFewerTokensThanBytes(t *testing.T) {
	t.Parallel()
	of := func(magic string) string {
		return base64.StdEncoding.EncodeToString([]byte(magic + strings.Repeat("\xff\xfe\xfd", 10000)))
	}
	png, jpeg, wav, pdf := of("\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"), of("\xff\xd8\xff\xe0"), of("RIFF\x00\x00\x00\x00WAVEfmt "), of("%PDF-1.7\n")
	picture := int64(len("data:image/png;base64,"+png) - Tokens)
	for name, c := range map[string]struct {
		body   string
		beyond int64
	}{
		"OpenAI's picture":     {`{"messages":[{"content":[{"type":"text","text":"a \" and \\"},{"type":"image_url","image_url":{"url":"data:image/png;base64,` + png + `"}}]}]}`, picture},
		"two of them":          {`["data:image/png;base64,` + png + `","data:image/png;base64,` + png + `"]`, 2 * picture},
		"as PHP writes it":     {`{"url":"data:image\/png;base64,` + strings.ReplaceAll(png, "/", `\/`) + `"}`, int64(len(`data:image\/png;base64,`+strings.ReplaceAll(png, "/", `\/`)) - Tokens)},
		"Anthropic's picture":  {`{"source":{"type":"base64","media_type":"image/jpeg","data":"` + jpeg + `"}}`, int64(len(jpeg) - Tokens)},
		"in the URL's letters": {`{"inlineData":{"data":"` + strings.NewReplacer("+", "-", "/", "_").Replace(jpeg) + `"}}`, int64(len(jpeg) - Tokens)},
		"sound":                {`{"input_audio":{"data":"` + wav + `","format":"wav"}}`, int64(len(wav) - len(wav)/PerToken)},
		// Its text may be as many tokens.
		"a document":            {`{"file_data":"data:application/pdf;base64,` + pdf + `"}`, 0},
		"said to be a picture":  {`{"url":"data:image/png;base64,` + pdf + `"}`, 0},
		"text":                  {`{"text":"` + strings.Repeat("lorem ipsum ", 1000) + `"}`, 0},
		"letters of base64":     {`{"text":"` + strings.Repeat("lorem", 1000) + `"}`, 0},
		"a small picture":       {`{"url":"data:image/png;base64,` + png[:400] + `"}`, 0},
		"not to its end":        {`{"text":"lorem \`, 0},
		"nothing":               {``, 0},
		"no JSON":               {strings.Repeat("x", 5000), 0},
		"an escape at the end":  {`"` + strings.Repeat(`\\`, 2000) + `"`, 0},
		"a picture not its end": {`{"data":"` + jpeg, int64(len(jpeg) - Tokens)},
	} {
		if got := Beyond([]byte(c.body)); got != c.beyond {
			t.Errorf("%s: %d, want %d", name, got, c.beyond)
		}
	}
}
