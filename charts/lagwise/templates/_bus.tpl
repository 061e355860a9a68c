{{/* Who a pod is to NATS. scope: root, account (or accounts). Secrets are mounted as files: the
     configuration and the environment hold none. */}}

{{- define "lagwise.authMode" -}}
{{- ternary "password" .Values.nats.external.auth .Values.nats.enabled -}}
{{- end -}}

{{- define "lagwise.authSecret" -}}
{{- if .Values.nats.enabled -}}
{{- .Values.nats.auth.existingSecret | default (printf "%s-accounts" (include "lagwise.objectName" (dict "root" . "role" "nats"))) -}}
{{- else -}}
{{- .Values.nats.external.secretName -}}
{{- end -}}
{{- end -}}

{{- define "lagwise.busEnv" -}}
{{- $mode := include "lagwise.authMode" .root -}}
{{- if eq $mode "password" -}}
- name: LAGWISE_BUS__USER
  value: {{ ternary .account (printf "%s%s" .root.Values.nats.external.userPrefix .account) .root.Values.nats.enabled }}
- name: LAGWISE_BUS__PASSWORD_FILE
  value: /etc/lagwise-bus/{{ .account }}/password
{{- else if eq $mode "creds" -}}
- name: LAGWISE_BUS__CREDENTIALS_FILE
  value: /etc/lagwise-bus/{{ .account }}/bus.creds
{{- end -}}
{{- end -}}

{{- define "lagwise.busMounts" -}}
{{- if ne (include "lagwise.authMode" .root) "none" -}}
- name: bus-{{ .account | replace "_" "-" }}
  mountPath: /etc/lagwise-bus/{{ .account }}
  readOnly: true
{{- end }}
{{- if include "lagwise.tls" .root }}
- name: bus-ca
  mountPath: /etc/lagwise-tls
  readOnly: true
{{- end -}}
{{- end -}}

{{- define "lagwise.busVolumes" -}}
{{- $root := .root -}}
{{- $mode := include "lagwise.authMode" $root -}}
{{- if ne $mode "none" -}}
{{- range .accounts }}
- name: bus-{{ . | replace "_" "-" }}
  secret:
    secretName: {{ include "lagwise.authSecret" $root }}
    defaultMode: 0440
    items:
      - key: {{ ternary (printf "%s.creds" .) . (eq $mode "creds") }}
        path: {{ ternary "bus.creds" "password" (eq $mode "creds") }}
{{- end }}
{{- end }}
{{- with include "lagwise.tls" $root }}
- name: bus-ca
  secret:
    secretName: {{ . }}
    defaultMode: 0440
    items:
      - key: ca.crt
        path: ca.crt
{{- end -}}
{{- end -}}
